"""Pairs from WebDataset's tar shards, the format of img2dataset and open_clip, read by random access."""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from declip.data.pair import BrokenPair, clean_captions, clean_keywords
from declip.data.sources.entry import EntrySource
from declip.data.sources.origin import Origin
from declip.data.sources.remote import counts
from declip.data.sources.shard_files import Shard, ShardFiles, UnreadableShard, find_shards
from declip.data.sources.shard_index import PARTS, ShardIndex, cached_index, index_lock, make_index
from declip.errors import UserError
from declip.io.progress import progress_bar

log = logging.getLogger("declip")

LARGEST_IMAGE = 100_000_000
"""Bytes of an image file that are read."""

LARGEST_TEXT = 1_000_000
"""Bytes of a text or JSON file that are read."""

CAPTION_KEYS = ("caption", "captions", "text", "texts")
KEYWORDS_KEY = "keywords"

OPEN_INDICES = 2048
"""Indices that stay mapped; each takes about 10 kB in addition to its map."""

MANY = 8
"""Shards above which a progress bar is shown while they are indexed."""

FETCHED_AT_ONCE = 8
CACHE_GB = 50.0
CACHE_GB_VARIABLE = "DECLIP_SHARD_CACHE_GB"


class ShardSource(EntrySource["ShardEntry"]):
    """Pairs of tar shards: `KEY.jpg` (or another image), and `KEY.txt` or `KEY.json` or both.

    The text file is one caption. The JSON file may have "caption" or "text", a string or a list of them, and
    "keywords", a list of strings. Each shard is indexed once; then a pair is read from its place in the file.

    Args:
        word: One or more shards: a file, a folder, a pattern, a brace range, a URL, or several joined by `::`.
        cache_gb: Size of the local cache of remote shards, in 10^9 bytes; by default DECLIP_SHARD_CACHE_GB or 50.

    Attributes:
        blocks: (shards,) int64, the number of pairs of each shard, in order.
        remote: Whether any shard has to be fetched.

    Raises:
        UserError: A shard is missing, unreachable, compressed or no tar archive, or none holds a pair.
    """

    blocks: np.ndarray

    def __init__(self, word: str, cache_gb: float | None = None) -> None:
        cache_gb = _cache_gb() if cache_gb is None else cache_gb
        self._arguments = (word, cache_gb)
        self._files = ShardFiles(cache_gb)
        self._shards = find_shards(word)
        self._index_of = lru_cache(OPEN_INDICES)(self._opened_index)
        self.remote = any(shard.remote for shard in self._shards)
        self.name = self._shards[0].label if len(self._shards) == 1 else _short(word)
        self.blocks = self._count()
        self._ends = np.cumsum(self.blocks)
        if not len(self):
            raise UserError(
                f"'{word}' holds no pair. A pair is KEY.jpg (or .png, .webp …) with KEY.txt or KEY.json, where KEY "
                "has no dot."
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def entry(self, index: int) -> "ShardEntry":
        return ShardEntry(self, index)

    def texts(self, entry: "ShardEntry") -> tuple[tuple[str, ...], tuple[str, ...]]:
        return entry.texts()

    def content(self, entry: "ShardEntry") -> bytes:
        return entry.content("image", LARGEST_IMAGE)

    def origin(self, index: int) -> Origin:
        shard, entries, row = self.place(index)
        at, size = entries.part(row, "image") or (0, 0)
        return Origin(shard.name, at, size, f"{shard.state[:16]}-{at}-{size}")

    def __reduce__(self) -> tuple[type["ShardSource"], tuple[object, ...]]:
        """Pickled as its arguments, so that a worker process opens the shards itself."""
        return ShardSource, self._arguments

    def place(self, index: int) -> tuple[Shard, ShardIndex, int]:
        """The shard of a pair, the shard's index and the pair's row in it; raises `BrokenPair`."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, "right"))
        shard, row = self._shards[number], index - int(self._ends[number] - self.blocks[number])
        try:
            entries = self._index_of(number)
        except (UnreadableShard, UserError) as error:
            raise BrokenPair("unreadable shard", f"{shard.label}, pair {row}", str(error)) from error
        if row >= len(entries):
            counted = f"the shard holds {len(entries):,} pairs instead of {self.blocks[number]:,}"
            raise BrokenPair("missing in shard", f"{shard.label}, pair {row}", counted)
        return shard, entries, row

    def read(self, shard: Shard, at: int, size: int) -> bytes:
        """Bytes of a shard, fewer at its end; raises `UnreadableShard`."""
        try:
            return self._files.open(shard).read(size, at)
        except OSError as error:
            raise UnreadableShard(error.strerror or str(error)) from error

    def _opened_index(self, number: int) -> ShardIndex:
        shard = self._shards[number]
        entries = cached_index(shard.state)
        if entries is not None:
            return entries
        with index_lock(shard.state):
            entries = cached_index(shard.state)
            return make_index(self._files.open(shard), shard.name, shard.state) if entries is None else entries

    def _count(self) -> np.ndarray:
        """The number of pairs of each shard: from `sizes.json` next to remote ones, else from the indices."""
        # A signature in a URL is for its shard alone: no other file of its folder can be requested.
        folders = [s.name.rpartition("/")[0] if s.remote and "?" not in s.name else "" for s in self._shards]
        promised = {folder: counts(folder) for folder in sorted(set(folders) - {""})}
        sizes = [promised.get(folder, {}).get(s.label) for folder, s in zip(folders, self._shards, strict=True)]
        open_ones = [number for number, count in enumerate(sizes) if count is None]
        new = sum(cached_index(self._shards[number].state) is None for number in open_ones)
        with ThreadPoolExecutor(FETCHED_AT_ONCE if self.remote else 1) as pool:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            with progress_bar(*columns, shown=new > MANY, transient=True) as bar:
                lengths = bar.track(pool.map(self._length, open_ones), len(open_ones), description="Indexing shards")
                for number, length in zip(open_ones, lengths, strict=True):
                    sizes[number] = length
        return np.array(sizes, np.int64)

    def _length(self, number: int) -> int:
        try:
            entries = self._opened_index(number)
            if entries.damage is not None:
                name, used = self._shards[number].name, len(entries) - 1
                log.warning("The shard '%s' is damaged: %s. Its first %d pairs are used.", name, entries.damage, used)
            return len(entries)
        except UnreadableShard as error:
            raise UserError(f"The shard '{self._shards[number].name}' cannot be read: {error}.") from error


def _short(word: str) -> str:
    """The last part of a word that names many shards, with the folder's name where it is a pattern."""
    folder, _, last = word.rstrip("/").rpartition("/")
    return f"{folder.rpartition('/')[2]}/{last}" if set(last) & set("{*?[") and folder else last


class ShardEntry:
    """A pair of a shard, located but not read."""

    def __init__(self, source: ShardSource, index: int) -> None:
        self._source = source
        self._shard, self._index, self._row = source.place(index)
        if self._index.damage is not None and self._row == len(self._index) - 1:
            raise BrokenPair("damaged shard", self._shard.label, f"{self._index.damage}; what follows is lost")
        self.key = f"{self._shard.label}/{self._index.key(self._row)}"
        if all(self._index.part(self._row, part) is None for part in PARTS):
            raise BrokenPair("dot in key", self.key, "WebDataset ends a key at the first dot; write shards without")

    def content(self, part: str, most: int) -> bytes:
        """The bytes of a part that must be there; raises `BrokenPair`."""
        place = self._index.part(self._row, part)
        if place is None:
            raise BrokenPair(f"missing {part}", self.key, "the shard has none of this key")
        at, size = place
        if size > most:
            reason = "image too large" if part == "image" else "caption too long"
            raise BrokenPair(reason, self.key, f"{part} of {size:,} bytes, at most {most:,}")
        try:
            content = self._source.read(self._shard, at, size)
        except UnreadableShard as error:
            raise BrokenPair("unreadable shard", self.key, str(error)) from error
        if len(content) < size:
            raise BrokenPair("truncated shard", self.key, f"{len(content):,} of the {part}'s {size:,} bytes are there")
        return content

    def texts(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Captions and keywords; raises `BrokenPair`."""
        captions: list[str | None] = []
        keywords: tuple[str, ...] = ()
        text, described = (self._index.part(self._row, part) for part in ("text", "json"))
        if text is not None:
            captions.append(self._unicode("text"))
        if described is not None:
            row = self._parsed()
            captions += _captions(row, self.key)
            keywords = clean_keywords(row[KEYWORDS_KEY]) if isinstance(row.get(KEYWORDS_KEY), list) else ()
        if text is None and (described is None or not captions):
            raise BrokenPair("missing caption", self.key, "no .txt, and no .json with a caption")
        return clean_captions(captions, self.key), keywords

    def _unicode(self, part: str) -> str:
        try:
            return self.content(part, LARGEST_TEXT).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenPair("invalid text", self.key, f"not UTF-8: {error}") from error

    def _parsed(self) -> dict[str, Any]:
        try:
            row = json.loads(self._unicode("json"))
        except (ValueError, RecursionError) as error:
            raise BrokenPair("unreadable JSON", self.key, str(error)) from error
        if not isinstance(row, dict):
            raise BrokenPair("unreadable JSON", self.key, "not an object")
        return row


def _captions(row: dict[str, Any], key: str) -> list[str | None]:
    """The captions of a parsed JSON file, from the first of `CAPTION_KEYS` that has any."""
    for name in CAPTION_KEYS:
        cell = row.get(name)
        captions = cell if isinstance(cell, list) else [cell]
        if not all(caption is None or isinstance(caption, str) for caption in captions):
            raise BrokenPair("unreadable JSON", key, f"{name} is no text: {str(cell)[:40]}")
        if any(captions):
            return captions
    return []


def _cache_gb() -> float:
    given = os.environ.get(CACHE_GB_VARIABLE, str(CACHE_GB))
    try:
        return float(given)
    except ValueError:
        raise UserError(f"{CACHE_GB_VARIABLE} is '{given}'; give a number of 10^9 bytes, such as 50.") from None
