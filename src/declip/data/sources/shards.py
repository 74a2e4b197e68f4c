"""Pairs from WebDataset's tar shards, the format of img2dataset and open_clip, read by random access."""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from declip.data.pair import BrokenPair, as_texts, clean_captions, clean_keywords
from declip.data.sources.entry import EntrySource, Texts
from declip.data.sources.origin import Origin
from declip.data.sources.remote import counts
from declip.data.sources.shard_files import Shard, ShardFiles, UnreadableShard, find_shards
from declip.data.sources.shard_index import PARTS, ShardIndex, make_index
from declip.errors import UserError
from declip.io.memo import cached_table
from declip.io.progress import progress_bar

log = logging.getLogger("declip")

LARGEST_IMAGE, LARGEST_TEXT = 100_000_000, 1_000_000
"""Bytes of an image file, and of a text or JSON file, that are read."""

CAPTION_KEYS = ("caption", "captions", "text", "texts")  # the first that has any is read

OPEN_INDICES = 2048  # indices that stay mapped; each takes about 10 kB in addition to its map
MANY = 8  # shards above which a progress bar is shown while they are indexed

FETCHED_AT_ONCE = 8


class ShardEntry(NamedTuple):
    """A pair of a shard: a row of the shard's index."""

    key: str
    shard: Shard
    pairs: ShardIndex
    row: int


class ShardSource(EntrySource):
    """Pairs of tar shards: `KEY.jpg` (or another image), and `KEY.txt` or `KEY.json` or both.

    The text file is one caption. The JSON file may have "caption" or "text", a string or a list of them, and
    "keywords", a list of strings. Each shard is indexed once; then a pair is read from its place in the file.

    Args:
        word: One or more shards: a file, a folder, a pattern, a brace range, a URL, or several joined by `::`.
        cache_gb: Size of the local cache of remote shards, in 10^9 bytes; by default DECLIP_SHARD_CACHE_GB or 50.
    """

    blocks: np.ndarray

    def __init__(self, word: str, cache_gb: float | None = None) -> None:
        cache_gb = _cache_gb() if cache_gb is None else cache_gb
        self._arguments = (word, cache_gb)
        self.files = ShardFiles(cache_gb)
        self._shards = find_shards(word)
        self._index_of = lru_cache(OPEN_INDICES)(self._opened_index)
        self.remote = any(shard.remote for shard in self._shards)
        parts = word.rstrip("/").split("/")[-2:]
        self.name = "/".join(parts if set(parts[-1]) & set("{*?[") else parts[-1:])
        if len(self._shards) == 1:
            self.name = self._shards[0].label
        self.blocks = self._count()
        self._ends = np.cumsum(self.blocks)
        if not len(self):
            raise UserError(
                f"'{word}' holds no pair. A pair is KEY.jpg (or .png, .webp …) with KEY.txt or KEY.json, where KEY "
                "has no dot."
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:  # a worker process opens the shards itself
        return ShardSource, self._arguments

    def entry(self, index: int) -> ShardEntry:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, "right"))
        shard, row = self._shards[number], index - int(self._ends[number] - self.blocks[number])
        try:
            pairs = self._index_of(number)
            if row >= len(pairs):
                counted = f"the shard holds {len(pairs):,} pairs instead of {self.blocks[number]:,}"
                raise BrokenPair("missing in shard", f"{shard.label}, pair {row}", counted)
        except (UnreadableShard, UserError) as error:
            raise BrokenPair("unreadable shard", f"{shard.label}, pair {row}", str(error)) from error
        if pairs.damage is not None and row == len(pairs) - 1:
            raise BrokenPair("damaged shard", shard.label, f"{pairs.damage}; what follows is lost")
        key = f"{shard.label}/{pairs.key(row)}"
        if all(pairs.part(row, part) is None for part in PARTS):
            raise BrokenPair("dot in key", key, "WebDataset ends a key at the first dot; write shards without")
        return ShardEntry(key, shard, pairs, row)

    def content(self, entry: ShardEntry) -> bytes:
        return self._read(entry, "image", LARGEST_IMAGE, "image too large")

    def texts(self, entry: ShardEntry) -> Texts:
        captions: list[str | None] = []
        keywords: tuple[str, ...] = ()
        has_text, has_json = (entry.pairs.part(entry.row, part) is not None for part in ("text", "json"))
        if has_text:
            captions.append(self._unicode(entry, "text"))
        if has_json:
            row = self._parsed(entry)
            cells = (as_texts(row.get(name), "unreadable JSON", entry.key) for name in CAPTION_KEYS)
            captions += next((texts for texts in cells if any(texts)), [])
            keywords = clean_keywords(row["keywords"]) if isinstance(row.get("keywords"), list) else ()
        if not captions:
            raise BrokenPair("missing caption", entry.key, "no .txt, and no .json with a caption")
        return clean_captions(captions, entry.key), keywords

    def origin(self, index: int) -> Origin:
        entry = self.entry(index)
        at, size = entry.pairs.part(entry.row, "image") or (0, 0)
        return Origin(entry.shard.name, at, size, f"{entry.shard.state[:16]}-{at}-{size}")

    def _read(self, entry: ShardEntry, part: str, most: int, reason: str) -> bytes:
        """The bytes of a part that must be there and no larger; raises `BrokenPair`."""
        place = entry.pairs.part(entry.row, part)
        if place is None:
            raise BrokenPair(f"missing {part}", entry.key, "the shard has none of this key")
        at, size = place
        if size > most:
            raise BrokenPair(reason, entry.key, f"{part} of {size:,} bytes, at most {most:,}")
        try:
            content = self.files.open(entry.shard).read(size, at)
        except (UnreadableShard, OSError) as error:
            raise BrokenPair("unreadable shard", entry.key, str(error)) from error
        if len(content) < size:
            raise BrokenPair("truncated shard", entry.key, f"{len(content):,} of {size:,} bytes of the {part}")
        return content

    def _unicode(self, entry: ShardEntry, part: str) -> str:
        try:
            return self._read(entry, part, LARGEST_TEXT, "caption too long").decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenPair("invalid text", entry.key, f"not UTF-8: {error}") from error

    def _parsed(self, entry: ShardEntry) -> dict[str, Any]:
        fault = "not an object"
        try:
            if isinstance(row := json.loads(self._unicode(entry, "json")), dict):
                return row
        except (ValueError, RecursionError) as error:
            fault = str(error)
        raise BrokenPair("unreadable JSON", entry.key, fault)

    def _opened_index(self, number: int) -> ShardIndex:
        shard = self._shards[number]

        def make() -> tuple[pa.Schema, list[pa.RecordBatch]]:
            batch = make_index(self.files.open(shard), shard.name)
            return batch.schema, [batch]

        return ShardIndex(cached_table("shards/index", shard.state, make))

    def _count(self) -> np.ndarray:
        """The number of pairs of each shard: from `sizes.json` next to remote ones, else from the indices."""
        # A signature in a URL is for its shard alone: no other file of its folder can be requested.
        folders = [s.name.rpartition("/")[0] if s.remote and "?" not in s.name else "" for s in self._shards]
        promised = {folder: counts(folder) for folder in sorted(set(folders) - {""})}
        sizes = [promised.get(folder, {}).get(s.label) for folder, s in zip(folders, self._shards, strict=True)]
        unknown = [number for number, count in enumerate(sizes) if count is None]
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with (
            ThreadPoolExecutor(FETCHED_AT_ONCE if self.remote else 1) as pool,
            progress_bar(*columns, shown=len(unknown) > MANY, transient=True) as bar,
        ):
            lengths = bar.track(pool.map(self._length, unknown), len(unknown), description="Indexing shards")
            for number, length in zip(unknown, lengths, strict=True):
                sizes[number] = length
        return np.array(sizes, np.int64)

    def _length(self, number: int) -> int:
        name = self._shards[number].name
        try:
            pairs = self._index_of(number)
        except UnreadableShard as error:
            raise UserError(f"The shard '{name}' cannot be read: {error}.") from error
        if pairs.damage is not None:
            log.warning(
                "The shard '%s' is damaged: %s. Its first %d pairs are used.", name, pairs.damage, len(pairs) - 1
            )
        return len(pairs)


def _cache_gb() -> float:
    given = os.environ.get("DECLIP_SHARD_CACHE_GB", "50")
    try:
        return float(given)
    except ValueError:
        raise UserError(f"DECLIP_SHARD_CACHE_GB is '{given}'; give a number of 10^9 bytes, such as 50.") from None
