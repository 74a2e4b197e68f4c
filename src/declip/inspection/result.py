"""What an inspection finds, as data."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import binomtest


@dataclass(frozen=True)
class Share:
    """A part of some.

    Attributes:
        count: How many are in it.
        of: Of how many.
        low: Lower end of the 95 % interval (Wilson 1927) of the share in the whole source.
        high: Its upper end; both are the share itself when the whole was read.
    """

    count: int
    of: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """Between 0 and 1; 0 of none."""
        return self.count / self.of if self.of else 0.0

    @classmethod
    def counted(cls, count: int, of: int, whole: bool) -> "Share":
        """Count a share, in the whole source or a sample of it."""
        if whole or not of:
            value = count / of if of else 0.0
            return cls(count, of, value, value)
        interval = binomtest(count, of).proportion_ci(method="wilson")
        return cls(count, of, float(interval.low), float(interval.high))


PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Spread:
    """How numbers are distributed.

    Attributes:
        n: How many there are.
        mean: Their mean.
        least: The smallest.
        most: The largest.
        percentiles: The value at each of `PERCENTILES`.
    """

    n: int
    mean: float
    least: float
    most: float
    percentiles: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half are below it."""
        return self.at(50)

    def at(self, percent: int) -> float:
        """The value at one of `PERCENTILES`."""
        return self.percentiles[PERCENTILES.index(percent)]

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Describe numbers, one at least."""
        points = tuple(float(value) for value in np.percentile(values, PERCENTILES))
        return cls(len(values), float(values.mean(dtype=np.float64)), float(values.min()), float(values.max()), points)


@dataclass(frozen=True)
class Histogram:
    """Counts of whole numbers: the last edge is open, so that `counts[-1]` are all from `edges[-1]` on.

    Attributes:
        edges: Where each bar starts.
        counts: As many.
    """

    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: np.ndarray, edges: tuple[int, ...]) -> "Histogram":
        """Count numbers, none below the first edge."""
        bars = np.searchsorted(edges, values, side="right") - 1
        return cls(edges, tuple(int(n) for n in np.bincount(bars, minlength=len(edges))))

    def labels(self) -> list[str]:
        """What each bar is of, such as "224-255" and "4,096 or more"."""
        ends = [f"{low:,}–{high - 1:,}" for low, high in zip(self.edges, self.edges[1:], strict=False)]
        return [*ends, f"{self.edges[-1]:,} or more"]


@dataclass(frozen=True)
class Images:
    """What the images are like; sizes in pixels, upright.

    Attributes:
        width: Of each.
        height: Of each.
        shorter: The shorter side.
        aspect: The longer side over the shorter.
        histogram: Of the shorter side.
        size: The side that training would see.
        smaller: Images whose shorter side is smaller than that.
        long: Images more than three times as long as wide.
        blank: Images of a single color.
        blank_keys: Keys of the first few.
        formats: Files by format, such as "JPEG"; empty where the source has no files.
        modes: Files by Pillow's mode, such as "RGB".
        bytes: Of the files; None where the source has none.
    """

    width: Spread
    height: Spread
    shorter: Spread
    aspect: Spread
    histogram: Histogram
    size: int
    smaller: Share
    long: Share
    blank: Share
    blank_keys: tuple[str, ...]
    formats: dict[str, int]
    modes: dict[str, int]
    bytes: Spread | None


@dataclass(frozen=True)
class Captions:
    """What the captions are like; of a pair with several, each counts.

    Attributes:
        per_pair: Captions a pair.
        words: Separated by spaces.
        characters: Of each.
        tokens: CLIP's, start and end included, nothing cut off.
        histogram: Of the tokens.
        cut: Captions that a context of so many tokens would cut.
        context: The shortest `text.context_length`, a multiple of 8 or 77, that cuts at most 1 %.
        kinds: Captions that are no more than a word, or no caption; see `captions.kind_of`.
        examples: Some of each kind.
        scripts: Captions by the script of most letters.
        frequent: The commonest captions, and the pairs that have them.
        common_words: Words in most captions, without the commonest of English, and the captions they are in.
        batch: The batch that `equal_in_batch` is of.
        equal_in_batch: Expected number of pairs of equal captions in such a batch: each is a false negative.
    """

    per_pair: Spread
    words: Spread
    characters: Spread
    tokens: Spread
    histogram: Histogram
    cut: dict[int, Share]
    context: int
    kinds: dict[str, Share]
    examples: dict[str, list[str]]
    scripts: dict[str, int]
    frequent: tuple[tuple[str, int], ...]
    common_words: tuple[tuple[str, int], ...]
    batch: int
    equal_in_batch: float


@dataclass(frozen=True)
class Group:
    """Pairs that show the same.

    Attributes:
        size: How many there are.
        keys: Of the first few.
        caption: The first one's.
    """

    size: int
    keys: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Repeats:
    """What comes more than once among the pairs read.

    Attributes:
        members: Pairs that share it with another pair.
        groups: Numbers of groups.
        surplus: Pairs that would go if one of each group stayed.
        coincidences: Pairs of pairs that share it.
        expected: About how many there are in the whole source, unbiased; the same when the whole was read.
        examples: The largest groups.
    """

    members: int
    groups: int
    surplus: int
    coincidences: int
    expected: float
    examples: tuple[Group, ...]


@dataclass(frozen=True)
class Overlap:
    """Images that another source has too, or look like one of its.

    Attributes:
        name: The other source.
        images: How many of its images were read, all that can be.
        found: Pairs read whose image is among them.
        keys: Of the first few.
    """

    name: str
    images: int
    found: Share
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Finding:
    """What a number means for training.

    Attributes:
        rule: Short name of the rule.
        number: What set it off.
        text: What was found.
        advice: What to do.
        mend: Whether to do it before training; else it is to be known.
    """

    rule: str
    number: float
    text: str
    advice: str
    mend: bool = False


@dataclass(frozen=True)
class Example:
    """A pair to look at.

    Attributes:
        key: The pair's.
        caption: Its first one.
        width: Of the image in the source, pixels.
        height: Likewise.
        image: A small copy.
    """

    key: str
    caption: str
    width: int
    height: int
    image: Image.Image


@dataclass(frozen=True)
class Inspection:
    """What a source of pairs holds; made by `inspect_source`.

    Attributes:
        name: Of the source.
        total: Pairs of the source.
        read: Pairs tried.
        seed: That chose them.
        seconds: That it took.
        broken: Pairs tried that cannot be used.
        reasons: Why, as `SkipCounter.to_dict` has it.
        images: None when no pair can be used; so for all that follow.
        captions: Likewise.
        keywords: Pairs that have keywords.
        keywords_per_pair: Mean over all.
        equal_images: The same pixels.
        near_images: Images that look alike, equal ones included.
        equal_captions: The same text to the tokenizer.
        overlaps: With other sources, as asked for.
        findings: What it means, what to mend first.
        examples: Pairs drawn at random, to look at.
        near_examples: Some groups of images that look alike.
        credit: Who made the images, where the source says so.
    """

    name: str
    total: int
    read: int
    seed: int
    seconds: float
    broken: Share
    reasons: dict[str, Any]
    images: Images | None = None
    captions: Captions | None = None
    keywords: Share | None = None
    keywords_per_pair: float = 0.0
    equal_images: Repeats | None = None
    near_images: Repeats | None = None
    equal_captions: Repeats | None = None
    overlaps: tuple[Overlap, ...] = ()
    findings: tuple[Finding, ...] = ()
    examples: tuple[Example, ...] = field(default=(), repr=False)
    near_examples: tuple[tuple[Example, ...], ...] = field(default=(), repr=False)
    credit: str = ""

    @property
    def whole(self) -> bool:
        """Whether every pair was tried."""
        return self.read == self.total

    @property
    def usable(self) -> int:
        """Pairs tried that can be used."""
        return self.read - self.broken.count

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the pictures."""
        pictures = ("examples", "near_examples")
        found = {each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name not in pictures}
        return {**found, "whole": self.whole, "usable": self.usable}

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        points = {f"p{percent}": number for percent, number in zip(PERCENTILES, value.percentiles, strict=True)}
        return {"n": value.n, "mean": value.mean, "min": value.least, **points, "max": value.most}
    if isinstance(value, Share):
        return {**asdict(value), "share": value.value}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    return value
