"""What a source of pairs is: an image with its captions, the ways it can be broken, and how to open one."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from PIL import Image

LONGEST_CAPTION = 20_000
"""Characters. The longest text that a model reads is 77 tokens; a caption beyond this is a page or a broken file."""

MOST_CAPTIONS = 10_000
"""Of one image. Public sets have five, region descriptions some fifty; beyond this a table's image column is wrong."""

MOST_SHOWN = 300
"""Characters of a key or detail in a message: a file can name its images as it likes."""

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")
"""What a terminal obeys and a reader does not see."""

UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Also line ends, what turns the direction of writing, and halves of characters, which cannot be written."""

EXAMPLES_KEPT = 5
"""Keys kept for each reason, enough to find the cause without a run's record growing with its data."""

BUILTIN_PREFIX = "builtin:"


@dataclass(frozen=True)
class Pair:
    """An image and the texts that go with it.

    Attributes:
        key: Stable name of the pair, shown to the user: a path, a row or a code point.
        image: RGB, upright, transparent pixels over white.
        captions: One or more, cleaned and not empty.
        keywords: Single words or short phrases; may be empty.
    """

    key: str
    image: Image.Image
    captions: tuple[str, ...]
    keywords: tuple[str, ...] = ()


class BrokenPair(Exception):
    """A pair that cannot be used; counted by its reason and never replaced by another.

    Args:
        reason: Short and of a small set, such as "truncated image"; what the counts are kept by.
        key: The pair's key.
        detail: What exactly was found.

    Key and detail may quote a file, so they are kept short and without what a terminal would obey.
    """

    def __init__(self, reason: str, key: str, detail: str = "") -> None:
        key, detail = printable(key), printable(detail)
        super().__init__(reason, key, detail)
        self.reason = reason
        self.key = key
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.key}" + (f" ({self.detail})" if self.detail else "")


@runtime_checkable
class PairSource(Protocol):
    """Pairs by number. A source can be pickled, and read from several processes.

    A source made for classification also has `labels`, int64 (n,), and `class_names`, where `class_names[labels[i]]`
    is the name of pair i's class.
    """

    name: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Pair:
        """Read pair `index`; raises `BrokenPair` where it cannot be used."""
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Read the captions alone, without decoding the image; raises `BrokenPair`."""
        ...


@dataclass
class SkipCounter:
    """Counts broken pairs by reason and keeps the first few keys of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, broken: BrokenPair) -> None:
        """Count one broken pair; a key met before is counted again but not shown twice."""
        self.counts[broken.reason] = self.counts.get(broken.reason, 0) + 1
        kept = self.examples.setdefault(broken.reason, [])
        if len(kept) < EXAMPLES_KEPT and broken.key not in kept:
            kept.append(broken.key)

    def merge(self, other: "SkipCounter") -> None:
        """Add what another counter counted; keys that are kept stay few."""
        for reason, keys in other.examples.items():
            for key in keys:
                self.add(BrokenPair(reason, key))
            self.counts[reason] += other.counts[reason] - len(keys)

    @property
    def total(self) -> int:
        """How many were counted, whatever the reason."""
        return sum(self.counts.values())

    def share(self, seen: int) -> float:
        """Share of the pairs seen, broken ones included, that were broken; 0 where none was seen."""
        return self.total / seen if seen else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain data: `{"reasons": {reason: {"count": n, "examples": [key, ...]}}}`."""
        rows = {r: {"count": n, "examples": list(self.examples.get(r, []))} for r, n in self.counts.items()}
        return {"reasons": dict(sorted(rows.items()))}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "SkipCounter":
        """Rebuild a counter from `to_dict`; keys other than "reasons" are left alone."""
        rows = state["reasons"]
        return cls({r: row["count"] for r, row in rows.items()}, {r: list(row["examples"]) for r, row in rows.items()})


def clean_captions(raw: Iterable[str | None], key: str) -> tuple[str, ...]:
    """Make captions usable: runs of white space and control characters become one space, empty and repeated ones go.

    Args:
        raw: Captions as they were written; None counts as empty.
        key: The pair's key, for the error.

    Returns:
        At least one caption, in the order given.

    Raises:
        BrokenPair: "empty caption" when nothing is left, "caption too long" when any is longer than
            `LONGEST_CAPTION` characters, "too many captions" beyond `MOST_CAPTIONS`, "invalid text" when one cannot
            be written as UTF-8.
    """
    cleaned: dict[str, None] = {}
    for number, text in enumerate(raw):
        if number >= MOST_CAPTIONS:
            raise BrokenPair("too many captions", key, f"more than {MOST_CAPTIONS:,}")
        if text and len(text) > LONGEST_CAPTION:
            raise BrokenPair("caption too long", key, f"{len(text):,} characters, at most {LONGEST_CAPTION:,}")
        if text and not is_unicode(text):
            raise BrokenPair("invalid text", key, "half of a character that takes two code units")
        if joined := " ".join(CONTROL.sub(" ", text or "").split()):
            cleaned[joined] = None
    if not cleaned:
        raise BrokenPair("empty caption", key)
    return tuple(cleaned)


def printable(text: str) -> str:
    """A text from a file as one short line that every terminal and file takes; what it cannot show is "�"."""
    shown = UNPRINTABLE.sub("\ufffd", text[: MOST_SHOWN + 1])
    return shown if len(text) <= MOST_SHOWN else f"{shown[: MOST_SHOWN - 1]}…"


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8; JSON's `\\ud800` alone cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
