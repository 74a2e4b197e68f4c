"""The result of an inspection: what is known about a source of pairs."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from declip.io.interval import wilson_interval
from declip.io.outputs import result_json


@dataclass(frozen=True)
class Fraction:
    """A count out of a number, as a fraction, 0 of none."""

    count: int
    of: int
    low: float  # 95 % interval (Wilson 1927) for the complete source; the fraction itself if all of it was read
    high: float
    fraction: float

    @classmethod
    def counted(cls, count: int, of: int, whole: bool) -> "Fraction":
        """The fraction of a complete source or of a sample of it."""
        value = count / of if of else 0.0
        if whole or not of:
            return cls(count, of, value, value, value)
        low, high = wilson_interval(value, of)
        return cls(count, of, max(0.0, low), min(1.0, high), value)


Spread = dict[str, float]


def spread_of(values: np.ndarray) -> Spread:
    """Distribution of one number or more: n, mean, min, max and the percentiles p1, p5, p25, p50, p75, p95 and p99."""
    mean = float(values.mean(dtype=np.float64))
    spread = {"n": len(values), "mean": mean, "min": float(values.min())}
    for percent in (1, 5, 25, 50, 75, 95, 99):
        spread[f"p{percent}"] = float(np.percentile(values, percent))
    return {**spread, "max": float(values.max())}


@dataclass(frozen=True)
class ImageStats:
    """Statistics of the images, in pixels after EXIF rotation."""

    shorter: Spread
    aspect: Spread  # the longer side over the shorter
    size: int  # side of the training images
    smaller: Fraction  # images whose shorter side is smaller than that


@dataclass(frozen=True)
class CaptionStats:
    """Statistics of the captions; every caption of a pair counts."""

    per_pair: Spread
    words: Spread
    tokens: Spread  # CLIP's, start and end included, not truncated
    # Captions that a `text.context_length` would truncate, by context length
    truncated: dict[int, Fraction]
    # The shortest, a multiple of 8 or 77, that truncates at most 1 %; 77 where none does
    context_length: int
    kinds: dict[str, Fraction]  # see `reading.KINDS`
    examples: dict[str, list[str]]  # of each kind
    batch_size: int
    # Expected number of couples of equal captions in a batch: false negatives
    equal_in_batch: float


@dataclass(frozen=True)
class RepeatGroup:
    """Pairs with the same image or caption."""

    size: int
    keys: tuple[str, ...]  # of the first
    caption: str  # the first, or the one that all have


@dataclass(frozen=True)
class Repeats:
    """The pairs read that have an image or a caption in common with another, and the largest groups of them."""

    members: int
    groups: int
    examples: tuple[RepeatGroup, ...]


@dataclass(frozen=True)
class Leakage:
    """Pairs whose image looks like one of the `images` that another source has, with their keys and indices."""

    name: str
    images: int
    matches: Fraction
    copies: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Finding:
    """A number that matters for training: a rule, which is a macro of the template findings.txt, and what it says."""

    rule: str
    number: float
    values: dict[str, Any] = field(default_factory=dict)
    fix: bool = False  # whether it should be fixed before training


class Example(NamedTuple):
    """A pair to look at."""

    key: str
    caption: str  # the first
    width: int  # of the image in the source
    height: int
    image: Image.Image  # a small copy


@dataclass(frozen=True)
class Inspection:
    """Everything known about a source of pairs; made by `inspect_source`."""

    name: str
    total: int  # pairs of the source
    read: int  # pairs tried
    seed: int
    seconds: float
    broken: Fraction  # pairs tried that cannot be used
    reasons: dict[str, Any]  # each with its count and examples
    images: ImageStats | None = None  # this and all that follow are empty when no pair can be used
    captions: CaptionStats | None = None
    equal_images: Repeats | None = None
    near_images: Repeats | None = None  # that look alike, equal ones included
    equal_captions: Repeats | None = None
    leakages: tuple[Leakage, ...] = ()
    # Held-out images of a source with splits that look like a training image
    split_copies: Fraction | None = None
    findings: tuple[Finding, ...] = ()  # what is to be fixed first
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

    def to_json(self) -> str:
        """All but the example images as JSON."""
        plain = asdict(replace(self, examples=(), near_examples=()))
        del plain["examples"], plain["near_examples"]
        return result_json({**plain, "whole": self.whole, "usable": self.usable})
