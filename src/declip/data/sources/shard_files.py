"""Finding the files of shards, and opening them, remote ones through a bounded folder of local copies."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from declip.data.sources import remote
from declip.data.sources.open_file import OpenFile
from declip.data.sources.remote import UnreadableShard
from declip.data.sources.shard_names import expand, is_url
from declip.errors import UserError
from declip.io.atomic import atomic_write, cache_folder
from declip.io.memo import locked

OPEN_FILES = 64  # local shards that a process keeps open; opening one on a network file system takes milliseconds
LAYOUT = 5  # raised when the index of a shard changes its meaning

ASKED_AT_ONCE = 16
RESTING = 60.0  # seconds before a shard that could not be fetched is tried again: each of its pairs would wait


class Shard(NamedTuple):
    """A shard that exists: its path or URL, its size in bytes, and hexadecimal digits that change when it does."""

    name: str
    size: int
    state: str

    @property
    def remote(self) -> bool:
        return is_url(self.name)

    @property
    def label(self) -> str:
        """The last part of its name, without a URL's query, which may be a signature."""
        return (self.name.partition("?")[0] if self.remote else self.name).rpartition("/")[2]


def find_shards(word: str) -> list[Shard]:
    """The shards that a word names (see `shard_names.expand`), in order."""
    try:
        with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
            return [shard for shards in pool.map(_look_up, expand(word)) for shard in shards]
    except (UnreadableShard, OSError) as error:
        raise UserError(f"A shard cannot be read: {error}.") from error


def _look_up(name: str) -> list[Shard]:
    if is_url(name):
        return [_shard(url, url, size, version) for url, size, version in remote.look_up(name)]
    status = os.stat(name)
    return [_shard(name, str(Path(name).resolve()), status.st_size, str(status.st_mtime_ns))]


def _shard(name: str, place: str, size: int, version: str) -> Shard:
    state = repr((LAYOUT, place, size, version)).encode(errors="surrogateescape")
    return Shard(name, size, hashlib.sha256(state).hexdigest()[:32])


class ShardFiles:
    """Opens shards; remote ones are fetched whole, and the least recently used copies beyond `cache_gb` removed."""

    def __init__(self, cache_gb: float) -> None:
        self._limit = cache_gb * 1e9
        self._failed: dict[str, tuple[float, str]] = {}
        self.open_local = lru_cache(OPEN_FILES)(OpenFile)

    def open(self, shard: Shard) -> OpenFile:
        """Open a shard for reading; raises `UnreadableShard`, or `UserError` for a full disk."""
        try:
            # A copy is not kept open: it takes room on the disk until the last process closes it.
            return self._copy(shard) if shard.remote else self.open_local(shard.name)
        except OSError as error:
            raise UnreadableShard(f"{shard.name}: {error.strerror or error}") from error

    def _copy(self, shard: Shard) -> OpenFile:
        path = cache_folder() / "shards" / "copies" / f"{shard.state}.tar"
        with suppress(FileNotFoundError):
            os.utime(path)  # the time of its last use, for `_make_room`
            return OpenFile(path)
        since, reason = self._failed.get(shard.state, (-RESTING, ""))
        if time.monotonic() - since < RESTING:
            raise UnreadableShard(reason)
        with locked("copies", shard.state):
            with suppress(FileNotFoundError):
                return OpenFile(path)  # fetched by another thread or process meanwhile
            try:
                with atomic_write(path) as partial:
                    remote.fetch(shard.name, partial, shard.size)
                    opened = OpenFile(partial)  # others who make room may remove the copy as soon as it has its name
            except UnreadableShard as error:
                self._failed[shard.state] = time.monotonic(), str(error)
                raise
        with suppress(FileNotFoundError):  # another process makes room, too
            self._make_room(path)
        return opened

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used copies beyond the limit."""
        copies = [(copy.stat(), copy) for copy in newest.parent.glob("*.tar")]
        total = 0
        for status, copy in sorted(copies, key=lambda entry: entry[0].st_mtime_ns, reverse=True):
            total += status.st_size
            if total > self._limit and copy != newest:
                copy.unlink(missing_ok=True)
