"""A pair of an image and its captions, the ways it can be broken, and the base class of all sources of pairs."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from declip.errors import UserError, unknown
from declip.io.text import percent, sanitize

# Characters of a caption, above which it is a page or a broken file, and captions of one image: public sets have five,
# region descriptions fifty; more mean a wrong image column.
LONGEST_CAPTION, MOST_CAPTIONS = 20_000, 10_000
CONTROL, SURROGATE = re.compile("[\x00-\x1f\x7f-\x9f]"), re.compile("[\ud800-\udfff]")
# Characters of a key or detail in a message: a file can name its images as it likes
MOST_SHOWN = 300
EXAMPLES_KEPT = 5  # keys kept for each reason, enough to find the cause without a run's record growing with its data
BLOCK = 1000  # pairs that are shuffled as one shard where a source has no shards


@dataclass(frozen=True)
class Pair:
    """An upright RGB image with one or more cleaned, nonempty captions, and the key by which messages name the pair."""

    key: str
    image: Image.Image
    captions: tuple[str, ...]


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
        return self.pixels(
            next((scale for scale in self.scales if min(self.size) >= least * scale), 1)
        )


@dataclass(frozen=True)
class LazyPair:
    """A `Pair` whose image may still be undecoded."""

    key: str
    image: LazyImage
    captions: tuple[str, ...]

    def decoded(self) -> Pair:
        """Decode the image; raises `BrokenPair`."""
        return Pair(self.key, self.image.decoded(), self.captions)


class BrokenPair(Exception):
    """The error of a pair that cannot be used. It is counted by its reason; the pair is never replaced by another."""

    def __init__(self, reason: str, key: str, detail: str = "") -> None:
        # both may quote a file
        self.reason = reason
        self.key = printable(key)
        self.detail = printable(detail)
        super().__init__(reason, self.key, self.detail)

    def __str__(self) -> str:
        return f"{self.reason}: {self.key}" + (f" ({self.detail})" if self.detail else "")


class Origin(NamedTuple):
    """Where an image is stored; numbers are bytes."""

    # Of the file or the shard, or a shard's URL; empty if the image is not in a file
    path: str = ""
    offset: int = 0
    size: int = 0  # 0: unknown
    # Identifies the content, as far as that shows without decoding it: it changes with the image,
    # and stays where the file is moved
    stamp: str = ""


class PairSource(ABC):
    """Pairs, read by index in any process. A subclass needs `name`, `__len__`, `__getitem__`; the rest is for speed."""

    name: str
    credit: str = ""  # a sentence that a license asks for wherever an image is shown
    # (n,) int64, where each pair has a class, by its index in `class_names`
    labels: np.ndarray | None = None
    class_names: Sequence[str] | None = None
    # Functions that open other splits of this dataset, such as "train" for a linear probe.
    other_splits: Mapping[str, Callable[[], PairSource]] = MappingProxyType({})
    group_column: str | None = None  # where `group` reads what pairs share
    captions_from: str = ""  # the columns and templates of captions, for messages
    column_names: Sequence[str] = ()  # the columns of a table, each of which `column` reads
    blocks: np.ndarray | None = None  # (shards,) int64, the number of pairs of each shard, in order
    remote: bool = False  # whether shards have to be fetched

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Pair:
        """Read pair `index`; raises `BrokenPair`, as every method below."""

    def captions(self, index: int) -> tuple[str, ...]:
        """Read the cleaned captions, without opening the image if possible."""
        return self.read_lazy(index).captions

    def key(self, index: int) -> str:
        """The key of pair `index`."""
        return self[index].key

    def group(self, index: int) -> int:
        """A number shared by pairs that show the same thing; 0 if unknown."""
        return 0

    def column(self, name: str) -> list[tuple[str, ...]]:
        """The cells of a column as text, of each pair those of its rows; raises `UserError` without it."""
        if not self.column_names:
            raise UserError(
                f"'{self.name}' has no column '{name}': it is not a table. Embed a table of the images."
            )
        raise unknown("column", name, map(printable, self.column_names))

    def other_columns(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """By each column of a table that is not read, its cells of some pairs as numbers, (n,) int64; 0 if empty."""
        return {}

    def splits(self) -> dict[str, np.ndarray]:
        """Rising indices of the pairs of each split, "train", "validation" and "test"; empty without splits."""
        return {}

    def image(self, index: int) -> Image.Image:
        """Read the image alone, whatever its captions are."""
        return self.lazy_image(index).decoded()

    def lazy_image(self, index: int) -> LazyImage:
        """As `image`, decoded on demand."""
        return LazyImage(self[index].image)

    def read_lazy(self, index: int) -> LazyPair:
        """Read pair `index` and decode as little of its image as possible."""
        pair = self[index]
        return LazyPair(pair.key, LazyImage(pair.image), pair.captions)

    def origin(self, index: int) -> Origin:
        """Where the image is stored; empty if it has no file."""
        return Origin()

    def shards(self) -> np.ndarray:
        """The number of pairs of each shard, (shards,) int64; without shards, of each `BLOCK` pairs."""
        blocks = (
            np.diff([*range(0, len(self), BLOCK), len(self)])
            if self.blocks is None
            else self.blocks
        )
        return np.asarray(blocks, np.int64)


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
        return {
            "reasons": {
                r: {"count": n, "examples": self.examples[r][:]}
                for r, n in sorted(self.counts.items())
            }
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> SkipCounter:
        """Rebuild a counter from `to_dict`."""
        rows = state["reasons"]
        return cls(
            {r: row["count"] for r, row in rows.items()},
            {r: list(row["examples"]) for r, row in rows.items()},
        )

    def lines(self) -> list[str]:
        """A line for each reason: its count, a few keys, the first detail."""
        details = {reason: f" ({detail})" for reason, detail in self.details.items() if detail}
        keys = {
            reason: ", ".join(examples) + details.get(reason, "")
            for reason, examples in self.examples.items()
        }
        return [
            f"{count:,} × {reason}, such as {keys[reason]}"
            for reason, count in sorted(self.counts.items())
        ]

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
        return f"{'; '.join(self.lines())}.{''.join(remedies.get(reason, '') for reason in self.counts)}"


def as_texts(cell: Any, reason: str, key: str) -> list[str | None]:
    """The captions of a cell, one or a list of them; raises `BrokenPair` if one is not text."""
    texts = list(cell) if isinstance(cell, list | tuple | np.ndarray) else [cell]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise BrokenPair(reason, key, f"the caption is not text: {str(cell)[:40]}")
    return texts


def clean_captions(raw: Iterable[str | None], key: str, why: str = "") -> tuple[str, ...]:
    """Collapse white space and control characters; drop empty and repeated ones; `BrokenPair` says why none is left."""
    cleaned: dict[str, None] = {}
    for number, text in enumerate(text or "" for text in raw):
        if number >= MOST_CAPTIONS:
            raise BrokenPair("too many captions", key, f"more than {MOST_CAPTIONS:,}")
        if len(text) > LONGEST_CAPTION:
            raise BrokenPair(
                "caption too long", key, f"{len(text):,} characters, at most {LONGEST_CAPTION:,}"
            )
        if not is_unicode(text):
            raise BrokenPair("invalid text", key, "half of a character that takes two code units")
        if joined := on_one_line(text):
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
