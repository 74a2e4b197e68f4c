"""A pair of an image and its captions, the ways it can be broken, and the base class of all sources of pairs."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from declip.errors import UserError, unknown
from declip.io.text import percent, sanitize

T = TypeVar("T")

# Characters of a caption, above which it is a page or a broken file, and captions of one image: public sets have five,
# region descriptions fifty; more mean a wrong image column.
LONGEST_CAPTION = 20_000
MOST_CAPTIONS = 10_000
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
SURROGATE = re.compile("[\ud800-\udfff]")
# Characters of a key or detail in a message: a file can name its images as it likes
MOST_SHOWN = 300
EXAMPLES_KEPT = 5  # keys kept for each reason, enough to find the cause without a run's record growing with its data
BLOCK = 1000  # pairs that are shuffled as one shard where a source has no shards


class LazyImage:
    """An image whose size is known and whose pixels are decoded on demand; this one of an image decoded already."""

    scales: tuple[int, ...] = ()  # divisors of the sides that decoding supports, largest first

    def __init__(self, image: Image.Image) -> None:
        self.size = image.size  # width and height, upright
        self._image = image

    def pixels(self, scale: int = 1) -> np.ndarray:
        """Decode to (H, W, 3) uint8, sides divided by 1 or one of `scales`, rounded up; raises `BrokenPair`."""
        return np.asarray(self._image)

    def decoded(self) -> Image.Image:
        """The image, upright and RGB; raises `BrokenPair`."""
        return Image.fromarray(self.pixels())

    def reduced(self, least: float) -> np.ndarray:
        """As `pixels`, as small as decoding can make it without a side below `least`."""
        for scale in self.scales:
            if min(self.size) >= least * scale:
                return self.pixels(scale)
        return self.pixels()


class BrokenPair(Exception):
    """The error of a pair that cannot be used. It is counted by its reason; the pair is never replaced by another."""

    def __init__(self, reason: str, key: str, detail: str = "") -> None:
        # both may quote a file
        self.reason = reason
        self.key = printable(key)
        self.detail = printable(detail)
        super().__init__(reason, self.key, self.detail)

    def __str__(self) -> str:
        text = f"{self.reason}: {self.key}"
        if self.detail:
            text += f" ({self.detail})"
        return text


class Origin(NamedTuple):
    """Where an image is stored; numbers are bytes."""

    # Path of the file or the shard, or a shard's URL; empty if the image is not in a file
    path: str = ""
    offset: int = 0
    size: int = 0  # 0: unknown
    # Identifies the content, as far as that shows without decoding it: it changes with the image,
    # and stays where the file is moved
    stamp: str = ""


@dataclass(frozen=True)
class Pair:
    """An image and its captions, of which nothing is read until it is asked for.

    Attributes:
        key: The name of the pair in messages and results.
        captions: Reads the cleaned captions, one or more; raises `BrokenPair`.
        open: Opens the image, whose pixels are decoded on demand; raises `BrokenPair`, as decoding does.
        origin: Finds where the image is stored.
    """

    key: str
    captions: Callable[[], tuple[str, ...]]
    open: Callable[[], LazyImage]
    origin: Callable[[], Origin] = Origin

    @classmethod
    def of(cls, key: str, image: Image.Image, captions: Sequence[str]) -> Pair:
        """A pair in memory: an upright RGB image and its captions, at least one."""
        return cls(key, partial(tuple, captions), partial(LazyImage, image))

    def image(self, least: float = inf) -> np.ndarray:
        """Decode the image, (H, W, 3) uint8, as small as decoding can make it without a side below `least`."""
        return self.open().reduced(least)


class PairSource(ABC):
    """Pairs by index, in any process. A subclass needs `name`, `__len__` and `__getitem__`."""

    name: str
    credit: str = ""  # a sentence that a license asks for wherever an image is shown
    # Numbers of all pairs, (n,) int64: "label", its index in `class_names`; "group", equal for pairs that show the same
    # thing, 0 if unknown; "split", see `declip.data.sources.splits.SPLITS`
    columns: Mapping[str, np.ndarray] = MappingProxyType({})
    class_names: Sequence[str] | None = None
    # Functions that open other splits of this dataset, such as "train" for a linear probe.
    other_splits: Mapping[str, Callable[[], PairSource]] = MappingProxyType({})
    # The columns of a table as text, of each pair the cells of its rows
    cells: Mapping[str, Sequence[tuple[str, ...]]] = MappingProxyType({})
    captions_from: str = ""  # the columns and templates of captions, for messages
    remote: bool = False  # whether shards have to be fetched

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Pair:
        """Pair `index`, which reads its captions or its image when asked; raises `BrokenPair` if it cannot be found."""

    def other_columns(self) -> dict[str, np.ndarray]:
        """By each column of a table that is not read, its cells as numbers, (n,) int64; 0 if empty."""
        return {}

    def shards(self) -> np.ndarray:
        """The number of pairs of each shard, (shards,) int64; without shards, of each `BLOCK` pairs."""
        return np.diff([*range(0, len(self), BLOCK), len(self)])


def locate(ends: np.ndarray, index: int) -> tuple[int, int]:
    """Find pair `index` of several parts: the number of its part, and its index in it; `ends` sums their sizes."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"pair {index} of {ends[-1]}")
    part = int(np.searchsorted(ends, index, "right"))
    if part:
        index -= int(ends[part - 1])
    return part, index


class OnDemand(Mapping[str, T]):
    """Values by name, each computed by its function when it is first asked for."""

    def __init__(self, functions: Mapping[str, Callable[[], T]]) -> None:
        self._functions = functions
        self._values: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._values:
            self._values[name] = self._functions[name]()
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)


def raise_broken(broken: BrokenPair) -> Any:
    """Raise the error of a pair; the function of a `Pair` that cannot be read."""
    raise broken


def cells_of(source: PairSource, column: str) -> Sequence[tuple[str, ...]]:
    """The cells of a table's column as text, of each pair those of its rows; raises `UserError` without it."""
    if not source.cells:
        raise UserError(
            f"'{source.name}' has no column '{column}': it is not a table. Embed a table of the images."
        )
    if column not in source.cells:
        raise unknown("column", column, map(printable, source.cells))
    return source.cells[column]


@dataclass
class SkipCounter:
    """Counts broken pairs by reason and keeps the first few keys, and the first detail, of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict, compare=False)  # not in a run's record

    def add(self, broken: BrokenPair) -> None:
        """Count one broken pair; a repeated key is counted again but listed once."""
        self.counts[broken.reason] = self.counts.get(broken.reason, 0) + 1
        self.details.setdefault(broken.reason, broken.detail)
        kept = self.examples.setdefault(broken.reason, [])
        if len(kept) < EXAMPLES_KEPT and broken.key not in kept:
            kept.append(broken.key)

    def merge(self, other: SkipCounter) -> None:
        """Add the counts of another counter."""
        for reason, keys in other.examples.items():
            for key in keys:
                self.add(BrokenPair(reason, key, other.details.get(reason, "")))
            self.counts[reason] += other.counts[reason] - len(keys)

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain data, for `from_dict`."""
        rows = {
            reason: {"count": count, "examples": self.examples[reason][:]}
            for reason, count in sorted(self.counts.items())
        }
        return {"reasons": rows}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> SkipCounter:
        """Rebuild a counter from `to_dict`."""
        counter = cls()
        for reason, row in state["reasons"].items():
            counter.counts[reason] = row["count"]
            counter.examples[reason] = list(row["examples"])
        return counter

    def lines(self) -> list[str]:
        """A line for each reason: its count, a few keys, the first detail."""
        lines = []
        for reason, count in sorted(self.counts.items()):
            keys = ", ".join(self.examples[reason])
            detail = self.details.get(reason)
            line = f"{count:,} × {reason}, such as {keys}"
            if detail:
                line += f" ({detail})"
            lines.append(line)
        return lines

    def refuse(self, seen: int, allowed: float, name: str) -> None:
        """Raise an error if more pairs are broken than `data.max_broken_fraction` allows."""
        if self.total <= allowed * seen:
            return
        share = percent(self.total / max(seen, 1))
        broken = f"{self.total:,} of the {seen:,} pairs of '{name}' could not be used ({share})"
        remedy = f"{self.explanation()} Fix or remove them, or raise it."
        raise UserError(f"{broken}; data.max_broken_fraction allows {percent(allowed)}. {remedy}")

    def explanation(self) -> str:
        """The reasons in one sentence, with the remedy of the most frequent mistake."""
        remedies = {
            "missing image": " A table's image paths are relative to its folder, or to data.image_root.",
            "missing caption": (
                " A folder needs a text file of the same name for each image, or a table metadata.csv. "
                "To choose images and type captions: declip choose, and declip app MODEL FOLDER --caption captions.csv."
            ),
        }
        needed = [remedies.get(reason, "") for reason in self.counts]
        return f"{'; '.join(self.lines())}.{''.join(needed)}"


def as_texts(cell: Any, reason: str, key: str) -> list[str | None]:
    """The captions of a cell, one or a list of them; raises `BrokenPair` if one is not text."""
    texts = [cell]
    if isinstance(cell, list | tuple | np.ndarray):
        texts = list(cell)
    if not all(text is None or isinstance(text, str) for text in texts):
        raise BrokenPair(reason, key, f"the caption is not text: {str(cell)[:40]}")
    return texts


def clean_captions(raw: Iterable[str | None], key: str, why: str = "") -> tuple[str, ...]:
    """Collapse white space and control characters; drop empty and repeated ones; `BrokenPair` says why none is left."""
    cleaned: dict[str, None] = {}
    for number, text in enumerate(raw):
        text = text or ""
        if number >= MOST_CAPTIONS:
            raise BrokenPair("too many captions", key, f"more than {MOST_CAPTIONS:,}")
        if len(text) > LONGEST_CAPTION:
            raise BrokenPair(
                "caption too long", key, f"{len(text):,} characters, at most {LONGEST_CAPTION:,}"
            )
        if not is_unicode(text):
            raise BrokenPair("invalid text", key, "half of a character that takes two code units")
        joined = on_one_line(text)
        if joined:
            cleaned[joined] = None
    if not cleaned:
        raise BrokenPair("empty caption", key, why)
    return tuple(cleaned)


def on_one_line(text: str) -> str:
    """Collapse white space and control characters."""
    return " ".join(CONTROL.sub(" ", text).split())


def printable(text: str) -> str:
    """Format a text from a file as one short line that is safe in every terminal and file."""
    return sanitize(text, MOST_SHOWN)


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded as UTF-8; JSON's lone `\\ud800` cannot."""
    return text.isascii() or not SURROGATE.search(text)
