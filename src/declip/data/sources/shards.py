"""Pairs from WebDataset's tar shards, read by random access; nothing is extracted or unpickled."""

import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from declip.data.images.decode import EXTENSIONS, LARGEST_IMAGE
from declip.data.pair import BrokenPair, Origin, as_texts, clean_captions, locate
from declip.data.sources.entry import EntrySource
from declip.data.sources.shard_files import (
    COPIES,
    OpenFile,
    Shard,
    UnreadableShard,
    counts,
    find_shards,
    open_shard,
)
from declip.errors import UserError
from declip.io.cache import cached_table, trim_cache
from declip.io.pool import pairs_bar

LARGEST_TEXT = 1_000_000  # bytes of a text or JSON file
# Bytes read of a member's headers: `tarfile` reads extended ones of any size they claim
LARGEST_HEADER = 1 << 18
LARGEST_SIZE = 1 << 62
END = bytes(tarfile.BLOCKSIZE)  # the header behind the last member
MOST_PADDING = 1 << 20  # bytes after the end of an archive; tar's own blocks have 10 KiB
OPEN_INDICES = 2048  # indices that stay mapped; each takes about 10 kB in addition to its map
# Shards above which a progress bar is shown while they are indexed, and remote ones that are fetched at once.
MANY = 8
AT_ONCE = 8

CAPTION_KEYS = ("caption", "captions", "text", "texts")  # the first that has any is read
# The member of a pair that a file is, by its extension.
KINDS = {ending.removeprefix("."): "image" for ending in EXTENSIONS}
KINDS |= {"txt": "text", "json": "json"}
# A key and its extension; as in WebDataset the key ends at the first dot of the file's name.
SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^./]*)", re.DOTALL)
# Columns of a shard's index: the key, and start and size of each member
PLACE = pa.list_(pa.int64(), 2)
SCHEMA = pa.schema({"key": pa.large_binary(), "image": PLACE, "text": PLACE, "json": PLACE})

# A shard, and start and size in bytes of each member of a pair that it has.
ShardEntry = tuple[Shard, Mapping[str, Sequence[int]]]


class ShardSource(EntrySource):
    """Pairs of tar shards: `KEY.jpg` (or another image), with `KEY.txt`, one caption, or `KEY.json`, or both."""

    def __init__(self, word: str) -> None:
        self._word = word
        try:
            self._shards = find_shards(word)
            self.remote = any(shard.remote for shard in self._shards)
            if self.remote:
                trim_cache(COPIES, keep=())
            self._sizes = self._count()
        except (UnreadableShard, OSError) as error:
            raise UserError(f"A shard cannot be read: {error}.") from error
        self.name = os.path.basename(word.rstrip("/"))
        if len(self._shards) == 1:
            self.name = self._shards[0].label
        self._ends = np.cumsum(self._sizes)
        if not len(self):
            raise UserError(
                f"'{word}' has no pair: KEY.jpg (.png …) with KEY.txt or KEY.json, where KEY has no dot."
            )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return ShardSource, (self._word,)  # a worker process opens the shards itself

    def entry(self, index: int) -> tuple[str, ShardEntry]:
        number, row = locate(self._ends, index)
        shard = self._shards[number]
        where = f"{shard.label}, pair {row}"
        try:
            pairs = open_index(shard)
        except (UnreadableShard, UserError) as error:
            raise BrokenPair("unreadable shard", where, str(error)) from error
        if row >= len(pairs):
            lacks = f"{len(pairs):,} pairs instead of {self._sizes[number]:,}"
            raise BrokenPair("missing in shard", where, lacks)
        cells = {name: pairs[name][row].as_py() for name in SCHEMA.names}
        key = cells.pop("key").decode(errors="backslashreplace")  # not every name is UTF-8
        members = {member: place for member, place in cells.items() if place is not None}
        return f"{shard.label}/{key}", (shard, members)

    def content(self, key: str, entry: ShardEntry) -> bytes:
        return self._read(key, entry, "image")

    def texts(self, key: str, entry: ShardEntry) -> tuple[str, ...]:
        _, members = entry
        captions: list[str | None] = []
        if "text" in members:
            captions.append(self._unicode(key, entry, "text"))
        if "json" in members:
            try:
                row: Any = json.loads(self._unicode(key, entry, "json"))
                given = [row.get(name) for name in CAPTION_KEYS]
            except (ValueError, AttributeError, RecursionError) as error:
                raise BrokenPair("unreadable JSON", key, f"not an object: {error}") from error
            cells = (as_texts(cell, "unreadable JSON", key) for cell in given)
            captions += next((texts for texts in cells if any(texts)), [])
        if not captions:
            raise BrokenPair("missing caption", key, "no .txt, and no .json with a caption")
        return clean_captions(captions, key)

    def shards(self) -> np.ndarray:
        return self._sizes

    def origin(self, key: str, entry: ShardEntry) -> Origin:
        shard, members = entry
        at, size = members.get("image", (0, 0))
        return Origin(shard.name, at, size, f"{shard.state[:16]}-{at}-{size}")

    def _read(self, key: str, entry: ShardEntry, member: str) -> bytes:
        """The bytes of a member that must be there, and not too large; raises `BrokenPair`."""
        shard, members = entry
        most = LARGEST_TEXT
        reason = "caption too long"
        if member == "image":
            most = LARGEST_IMAGE
            reason = "image too large"
        if member not in members:
            raise BrokenPair(f"missing {member}", key, "the shard has none of this key")
        at, size = members[member]
        if size > most:
            raise BrokenPair(reason, key, f"{member} of {size:,} bytes, at most {most:,}")
        try:
            content = open_shard(shard).read(size, at)
        except (UnreadableShard, OSError) as error:
            raise BrokenPair("unreadable shard", key, str(error)) from error
        if len(content) < size:
            read = f"{len(content):,} of {size:,} bytes of the {member}"
            raise BrokenPair("truncated shard", key, read)
        return content

    def _unicode(self, key: str, entry: ShardEntry, member: str) -> str:
        try:
            return self._read(key, entry, member).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise BrokenPair("invalid text", key, f"not UTF-8: {error}") from error

    def _count(self) -> np.ndarray:
        """The number of pairs of each shard: from `sizes.json` next to remote ones, else from the indices."""
        promised = cache(counts)
        sizes = list[int | None]()
        for shard in self._shards:
            known = dict[str, int]()
            # A signature in a URL is for its shard alone: no other file of its folder can be requested.
            if shard.remote and "?" not in shard.name:
                known = promised(os.path.dirname(shard.name))
            sizes.append(known.get(shard.label))
        unknown = [number for number, count in enumerate(sizes) if count is None]
        at_once = 1
        if self.remote:
            at_once = AT_ONCE
        with ThreadPoolExecutor(at_once) as pool, pairs_bar(len(unknown) > MANY) as bar:
            indices = pool.map(open_index, [self._shards[number] for number in unknown])
            indexed = bar.track(indices, len(unknown), description="Indexing shards")
            for number, pairs in zip(unknown, indexed, strict=True):
                sizes[number] = len(pairs)
        return np.array(sizes, np.int64)


@lru_cache(OPEN_INDICES)
def open_index(shard: Shard) -> pa.Table:
    """The pairs of a shard, see `SCHEMA`, mapped from the cache."""

    def make() -> tuple[pa.Schema, list[pa.RecordBatch]]:
        pairs = make_index(open_shard(shard), shard.name)
        return SCHEMA, [pairs]

    return cached_table("shards/index", shard.state, make)


def make_index(file: OpenFile, name: str) -> pa.RecordBatch:
    """Find the pairs of a shard: members of one key, of each extension one. A damaged shard raises `UserError`."""
    rows: list[dict[str, object]] = []
    latest: dict[str, dict[str, object]] = {}
    images: dict[str, str] = {}  # the extension of the latest pair's image by key
    try:
        for member, at, size in members(file):
            match = SAMPLE.fullmatch(member)
            if match is None:
                continue
            key = match[1]
            ending = match[2].lower()
            if ending not in KINDS:
                continue
            member = KINDS[ending]
            if member == "image" and images.setdefault(key, ending) != ending:
                continue
            if key not in latest or member in latest[key]:
                latest[key] = {"key": key.encode(errors="surrogateescape")}
                rows.append(latest[key])
            latest[key][member] = (at, size)
    except (tarfile.TarError, OSError) as error:
        problem = f"The shard '{name}' cannot be read as a tar archive beyond its first {len(rows):,} pairs: {error}."
        raise UserError(
            f"{problem} Fetch or write it again, or remove it; decompress a compressed one."
        ) from error
    return pa.RecordBatch.from_pylist(rows, SCHEMA)


def members(file: OpenFile) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each plain file of an archive, the start of its content and its size in bytes.

    `tarfile.TarFile.next` takes most damage for the end of the archive, so headers are read one by one here. The last
    content may reach beyond the end of the file. An invalid header is a TarError; members yielded before can be used.
    """
    headers = _Headers(file)
    at = 0
    try:
        tar = tarfile.TarFile(
            fileobj=headers,  # type: ignore[arg-type]  # it can only read, seek and tell, which is enough
            encoding="utf-8",
            errors="surrogateescape",
        )
        while at < file.size and file.read(tarfile.BLOCKSIZE, at) != END:
            headers.seek(at)
            info = tarfile.TarInfo.fromtarfile(tar)
            if tar.offset <= at or info.size < 0:
                raise tarfile.HeaderError("negative size")
            at = tar.offset
            if info.isreg() and not info.issparse():
                yield info.name, info.offset_data, min(info.size, LARGEST_SIZE)
    except OSError:
        raise
    except Exception as error:  # of any kind, from an invalid header
        raise tarfile.TarError(f"{error or type(error).__name__} at byte {at:,}") from error
    if at > file.size:
        raise tarfile.TarError(f"cut short: {file.size:,} bytes of at least {at:,}")
    if file.size - at > MOST_PADDING:
        raise tarfile.TarError(f"empty from byte {at:,} on, as an unfinished download is")


class _Headers:
    """A file for `tarfile` that returns at most `LARGEST_HEADER` bytes between two seeks."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self.seek(0)

    def seek(self, at: int) -> None:
        self._at = at
        self._left = LARGEST_HEADER

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self._left:
            raise tarfile.HeaderError(f"an extended header of {size:,} bytes")
        content = self._file.read(size, self._at)
        self._at = self._at + len(content)
        self._left = self._left - size
        return content
