"""The numbers of an inspection."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from PIL import Image

from declip.evaluation.results import Measure


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
        low, high = Measure("", value, 0.0, of).interval
        return cls(count, of, max(0.0, low), min(1.0, high), value)


# A distribution: n, mean, min, max and the percentiles p1, p5, p25, p50, p75, p95 and p99.
Spread = dict[str, float]


def spread_of(values: np.ndarray) -> Spread:
    """Describe at least one number."""
    percentiles = {f"p{at}": float(np.percentile(values, at)) for at in (1, 5, 25, 50, 75, 95, 99)}
    ends = {"min": float(values.min()), **percentiles, "max": float(values.max())}
    return {"n": len(values), "mean": float(values.mean(dtype=np.float64)), **ends}


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
    truncated: dict[int, Fraction]  # captions that a `text.context_length` would truncate, by context length
    context_length: int  # the shortest, a multiple of 8 or 77, that truncates at most 1 %; 77 where none does
    kinds: dict[str, Fraction]  # see `reading.KINDS`
    examples: dict[str, list[str]]  # of each kind
    batch_size: int
    equal_in_batch: float  # expected number of couples of equal captions in a batch: false negatives


@dataclass(frozen=True)
class RepeatGroup:
    """Pairs with the same image or caption: how many, the first keys, and the first or common caption."""

    size: int
    keys: tuple[str, ...]
    caption: str


@dataclass(frozen=True)
class Repeats:
    """The pairs read that have an image or a caption in common with another, and the largest groups of them."""

    members: int
    groups: int
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
    """A number that matters for training: a rule, which is a macro of the template findings.txt, and what it says."""

    rule: str
    number: float
    values: dict[str, Any] = field(default_factory=dict)
    fix: bool = False  # whether it should be fixed before training


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

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the example images."""
        plain = asdict(replace(self, examples=(), near_examples=()))
        del plain["examples"], plain["near_examples"]
        return {**plain, "whole": self.whole, "usable": self.usable}

    def to_json(self) -> str:
        """The plain data as JSON."""
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
