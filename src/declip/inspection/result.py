"""The numbers of an inspection."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import binomtest


@dataclass(frozen=True)
class Fraction:
    """A count out of a number.

    Attributes:
        low, high: 95 % interval (Wilson 1927) for the whole source; the fraction itself when the whole was read.
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
    def counted(cls, count: int, of: int, whole: bool) -> "Fraction":
        """Make the fraction of a whole source or of a sample of it."""
        if whole or not of:
            value = count / of if of else 0.0
            return cls(count, of, value, value)
        interval = binomtest(count, of).proportion_ci(method="wilson")
        return cls(count, of, float(interval.low), float(interval.high))


PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Spread:
    """A distribution of n numbers: mean, minimum, maximum, and the value at each of `PERCENTILES`."""

    n: int
    mean: float
    min: float
    max: float
    percentiles: tuple[float, ...]

    @property
    def median(self) -> float:
        """The 50th percentile."""
        return self.at(50)

    def at(self, percent: int) -> float:
        """The value at one of `PERCENTILES`."""
        return self.percentiles[PERCENTILES.index(percent)]

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Describe at least one number."""
        points = tuple(float(value) for value in np.percentile(values, PERCENTILES))
        return cls(len(values), float(values.mean(dtype=np.float64)), float(values.min()), float(values.max()), points)


@dataclass(frozen=True)
class Histogram:
    """Counts of integers in bars that start at `edges`; the last bar is open."""

    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: np.ndarray, edges: tuple[int, ...]) -> "Histogram":
        """Count numbers, none below the first edge."""
        bars = np.searchsorted(edges, values, side="right") - 1
        return cls(edges, tuple(int(n) for n in np.bincount(bars, minlength=len(edges))))

    def labels(self) -> list[str]:
        """Ranges such as "224–255" and "4,096 or more"."""
        ends = [f"{low:,}–{high - 1:,}" for low, high in zip(self.edges, self.edges[1:], strict=False)]
        return [*ends, f"{self.edges[-1]:,} or more"]


@dataclass(frozen=True)
class ImageStats:
    """Statistics of the images; sizes in pixels, after EXIF rotation.

    Attributes:
        aspect: The longer side over the shorter.
        histogram: Of the shorter side.
        size: Side of the training images.
        smaller: Images whose shorter side is smaller than that.
        long: Images more than three times as long as wide.
        blank: Images of a single color.
        blank_keys: Keys of the first few.
        formats, modes: Files by format and by Pillow's mode; empty where the source has no files.
        bytes: Size of the files; None where the source has none.
    """

    width: Spread
    height: Spread
    shorter: Spread
    aspect: Spread
    histogram: Histogram
    size: int
    smaller: Fraction
    long: Fraction
    blank: Fraction
    blank_keys: tuple[str, ...]
    formats: dict[str, int]
    modes: dict[str, int]
    bytes: Spread | None


@dataclass(frozen=True)
class CaptionStats:
    """Statistics of the captions; every caption of a pair counts.

    Attributes:
        tokens: CLIP's, start and end included, nothing truncated.
        histogram: Of the tokens.
        truncated: Captions that a `text.context_length` would truncate, by context length.
        context_length: The shortest, a multiple of 8 or 77, that truncates at most 1 %; 77 where none does.
        kinds: Captions that are one word, or do not describe; see `captions.kind_of`.
        scripts: Captions by the script of most letters.
        frequent: The most frequent captions, and the number of pairs that have them.
        common_words: Words in most captions, without stop words, and the number of captions they are in.
        batch_size: The batch that `equal_in_batch` is for.
        equal_in_batch: Expected number of couples of equal captions in such a batch: each is a false negative.
    """

    per_pair: Spread
    words: Spread
    characters: Spread
    tokens: Spread
    histogram: Histogram
    truncated: dict[int, Fraction]
    context_length: int
    kinds: dict[str, Fraction]
    examples: dict[str, list[str]]
    scripts: dict[str, int]
    frequent: tuple[tuple[str, int], ...]
    common_words: tuple[tuple[str, int], ...]
    batch_size: int
    equal_in_batch: float


@dataclass(frozen=True)
class RepeatGroup:
    """Pairs with the same image or caption: how many, the first keys, and the first caption."""

    size: int
    keys: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Repeats:
    """Images or captions that several of the pairs read have.

    Attributes:
        members: Pairs that have one in common with another pair.
        surplus: Pairs that would go if one of each group stayed.
        coincidences: Couples of pairs that have one in common.
        expected: Unbiased estimate of those in the whole source; the same when the whole was read.
        examples: The largest groups.
    """

    members: int
    groups: int
    surplus: int
    coincidences: int
    expected: float
    examples: tuple[RepeatGroup, ...]


@dataclass(frozen=True)
class Leakage:
    """Images that look like one of another source, such as a test set.

    Attributes:
        images: How many of its images were read, all that can be.
        found: Pairs whose image is among them.
        copies: Their keys and places in the source.
    """

    name: str
    images: int
    found: Fraction
    copies: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Finding:
    """A number that matters for training.

    Attributes:
        rule: Name of the rule, and of its macro in the template findings.txt.
        values: Numbers and names for the sentence.
        fix: Whether it should be fixed before training.
    """

    rule: str
    number: float
    values: dict[str, Any] = field(default_factory=dict)
    fix: bool = False


@dataclass(frozen=True)
class Example:
    """A pair to look at: its key, its first caption, its image's size in the source, and a small copy."""

    key: str
    caption: str
    width: int
    height: int
    image: Image.Image


@dataclass(frozen=True)
class Inspection:
    """Everything known about a source of pairs; made by `inspect_source`.

    Attributes:
        total: Pairs of the source.
        read: Pairs tried.
        broken: Pairs tried that cannot be used.
        reasons: Reasons, each with its count and examples.
        images, captions: Statistics; these and all that follow are empty when no pair can be used.
        keywords: Pairs that have keywords.
        keywords_per_pair: Mean over all pairs.
        equal_images: The same pixels.
        near_images: Images that look alike, equal ones included.
        equal_captions: The same text to the tokenizer.
        findings: What matters for training, what is to be fixed first.
        near_examples: Some groups of images that look alike.
        credit: Who made the images, where the source says so.
    """

    name: str
    total: int
    read: int
    seed: int
    seconds: float
    broken: Fraction
    reasons: dict[str, Any]
    images: ImageStats | None = None
    captions: CaptionStats | None = None
    keywords: Fraction | None = None
    keywords_per_pair: float = 0.0
    equal_images: Repeats | None = None
    near_images: Repeats | None = None
    equal_captions: Repeats | None = None
    leakages: tuple[Leakage, ...] = ()
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
        """Plain data, without the example images."""
        images = ("examples", "near_examples")
        found = {each.name: _plain(getattr(self, each.name)) for each in fields(self) if each.name not in images}
        return {**found, "whole": self.whole, "usable": self.usable}

    def to_json(self) -> str:
        """The plain data as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Spread):
        points = {f"p{percent}": number for percent, number in zip(PERCENTILES, value.percentiles, strict=True)}
        return {"n": value.n, "mean": value.mean, "min": value.min, **points, "max": value.max}
    if isinstance(value, Fraction):
        return {**asdict(value), "fraction": value.value}
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if hasattr(value, "__dataclass_fields__"):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    return value
