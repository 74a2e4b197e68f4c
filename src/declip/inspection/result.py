"""The numbers of an inspection."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image
from scipy.stats import binomtest


@dataclass(frozen=True)
class Fraction:
    """A count out of a number.

    Attributes:
        low, high: 95 % interval (Wilson 1927) for the whole source; the fraction itself when the whole was read.
        fraction: Between 0 and 1; 0 of none.
    """

    count: int
    of: int
    low: float
    high: float
    fraction: float

    @property
    def value(self) -> float:
        """The fraction."""
        return self.fraction

    @classmethod
    def counted(cls, count: int, of: int, whole: bool) -> "Fraction":
        """Make the fraction of a whole source or of a sample of it."""
        value = count / of if of else 0.0
        if whole or not of:
            return cls(count, of, value, value, value)
        interval = binomtest(count, of).proportion_ci(method="wilson")
        return cls(count, of, float(interval.low), float(interval.high), value)


@dataclass(frozen=True)
class Spread:
    """A distribution of n numbers: mean, ends and percentiles."""

    n: int
    mean: float
    min: float
    p1: float
    p5: float
    p25: float
    p50: float
    p75: float
    p95: float
    p99: float
    max: float

    @property
    def median(self) -> float:
        """The 50th percentile."""
        return self.p50

    def at(self, percent: int) -> float:
        """One of the percentiles."""
        return float(getattr(self, f"p{percent}"))

    @classmethod
    def of(cls, values: np.ndarray) -> "Spread":
        """Describe at least one number."""
        points = np.percentile(values, (0, 1, 5, 25, 50, 75, 95, 99, 100))
        return cls(len(values), float(values.mean(dtype=np.float64)), *map(float, points))


@dataclass(frozen=True)
class ImageStats:
    """Statistics of the images, in pixels after EXIF rotation.

    Attributes:
        aspect: The longer side over the shorter.
        size, smaller: Side of the training images, and images whose shorter side is smaller.
        long, blank: Images more than three times as long as wide, and of a single color.
    """

    width: Spread
    height: Spread
    shorter: Spread
    aspect: Spread
    size: int
    smaller: Fraction
    long: Fraction
    blank: Fraction
    blank_keys: tuple[str, ...]


@dataclass(frozen=True)
class CaptionStats:
    """Statistics of the captions; every caption of a pair counts.

    Attributes:
        tokens: CLIP's, start and end included, nothing truncated.
        truncated: Captions that a `text.context_length` would truncate, by context length.
        context_length: The shortest, a multiple of 8 or 77, that truncates at most 1 %; 77 where none does.
        kinds, examples: Captions that are one word, or do not describe; see `captions.kind_of`.
        equal_in_batch: Expected number of couples of equal captions in a batch of `batch_size`: false negatives.
    """

    per_pair: Spread
    words: Spread
    characters: Spread
    tokens: Spread
    truncated: dict[int, Fraction]
    context_length: int
    kinds: dict[str, Fraction]
    examples: dict[str, list[str]]
    scripts: dict[str, int]
    batch_size: int
    equal_in_batch: float


@dataclass(frozen=True)
class RepeatGroup:
    """Pairs with the same image or caption: how many, the first keys, and the first or common caption."""

    size: int
    keys: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Repeats:
    """Images or captions that several of the pairs read have, with the largest groups as examples.

    Attributes:
        members: Pairs that have one in common with another pair.
        surplus: Pairs that would go if one of each group stayed.
        coincidences, expected: Couples of pairs that have one in common, and an unbiased estimate for the whole source.
    """

    members: int
    groups: int
    surplus: int
    coincidences: int
    expected: float
    examples: tuple[RepeatGroup, ...]


@dataclass(frozen=True)
class Leakage:
    """Pairs whose image looks like one of the `images` that another source has, with their keys and places."""

    name: str
    images: int
    found: Fraction
    copies: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Finding:
    """A number that matters for training, with numbers and names for the sentence of the template findings.txt.

    Attributes:
        rule: Name of the rule, and of its macro in the template.
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
        total, read, broken: Pairs of the source, pairs tried, and those of them that cannot be used.
        reasons: Reasons, each with its count and examples.
        images, captions: Statistics; these and all that follow are empty when no pair can be used.
        near_images: Images that look alike, equal ones included.
        findings: What matters for training, what is to be fixed first.
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
        plain = asdict(replace(self, examples=(), near_examples=()))
        del plain["examples"], plain["near_examples"]
        return {**plain, "whole": self.whole, "usable": self.usable}

    def to_json(self) -> str:
        """The plain data as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
