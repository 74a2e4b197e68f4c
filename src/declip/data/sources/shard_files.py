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
from declip.data.sources.shard_names import expand, is_url, path_of
from declip.errors import UserError
from declip.io.atomic import DAY, atomic_write, cache_folder
from declip.io.memo import locked
from declip.io.open_file import OpenFile

OPEN_FILES = 64  # local shards that a process keeps open; opening one on a network file system takes milliseconds
LAYOUT = 3  # raised when the index of a shard changes its meaning

ASKED_AT_ONCE = 16
RESTING = 60.0
"""Seconds before a shard that could not be fetched is tried again: each of its pairs would wait as long."""


class Shard(NamedTuple):
    """A shard that exists: its path or URL, its size in bytes, and hexadecimal digits that change when it does."""

    name: str
    size: int
    state: str

    @property
    def remote(self) -> bool:
        """Whether it has to be fetched before it can be read."""
        return is_url(self.name)

    @property
    def label(self) -> str:
        """The last part of its name."""
        return path_of(self.name).rpartition("/")[2]


class UnreadableShard(Exception):
    """A shard that was there cannot be opened; the message is the reason."""


def find_shards(word: str) -> list[Shard]:
    """The shards that a word names (see `shard_names.expand`), in order."""
    with ThreadPoolExecutor(ASKED_AT_ONCE) as pool:
        return [shard for shards in pool.map(_look_up, expand(word)) for shard in shards]


def _look_up(name: str) -> list[Shard]:
    if is_url(name):
        return [_shard(url, url, size, version) for url, size, version in remote.look_up(name)]
    try:
        status = os.stat(name)
    except OSError as error:
        raise UserError(f"The shard '{name}' cannot be read: {error.strerror}.") from error
    return [_shard(name, str(Path(name).resolve()), status.st_size, str(status.st_mtime_ns))]


def _shard(name: str, place: str, size: int, version: str) -> Shard:
    state = repr((LAYOUT, place, size, version)).encode(errors="surrogateescape")
    return Shard(name, size, hashlib.sha256(state).hexdigest()[:32])


class ShardFiles:
    """Opens shards; remote ones are fetched whole, and the least recently used copies removed.

    Args:
        cache_gb: Limit of the copies in 10^9 bytes; the one in use stays even if it alone exceeds it.
    """

    def __init__(self, cache_gb: float) -> None:
        self._limit = cache_gb * 1e9
        self._failed: dict[str, tuple[float, str]] = {}
        self.open_local = lru_cache(OPEN_FILES)(OpenFile)

    def open(self, shard: Shard) -> OpenFile:
        """Open a shard for reading; raises `UnreadableShard`, or `UserError` for a full disk."""
        try:
            if not shard.remote:
                return self.open_local(shard.name)
            for _ in range(3):  # another process may remove the copy before it is opened
                with suppress(FileNotFoundError):
                    # Not kept open: it takes room on the disk until the last process closes it.
                    return OpenFile(self._fetched(shard))
        except OSError as error:
            raise UnreadableShard(error.strerror or str(error)) from error
        raise UnreadableShard("its copy is removed as soon as it is made; raise DECLIP_SHARD_CACHE_GB")

    def _fetched(self, shard: Shard) -> Path:
        """The local copy of a remote shard, fetched if missing."""
        copy = cache_folder() / "shards" / "copies" / f"{shard.state}.tar"
        try:
            os.utime(copy)  # the time of its last use, for `_make_room`
            return copy
        except FileNotFoundError:
            pass
        since, reason = self._failed.get(shard.state, (-RESTING, ""))
        if time.monotonic() - since < RESTING:
            raise UnreadableShard(reason)
        with locked("copies", shard.state):
            if not copy.exists():
                try:
                    with atomic_write(copy) as partial:
                        remote.fetch(shard.name, partial, shard.size)
                except remote.Unreachable as error:
                    self._failed[shard.state] = time.monotonic(), str(error)
                    raise UnreadableShard(str(error)) from error
        self._make_room(copy)
        return copy

    def _make_room(self, newest: Path) -> None:
        """Remove the least recently used copies beyond the limit, and the files of killed processes."""
        held: list[tuple[float, int, Path]] = []
        for path in newest.parent.iterdir():
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix == ".tar":
                held.append((status.st_mtime, status.st_size, path))
            elif path.suffix == ".partial" and time.time() - status.st_mtime > DAY:
                path.unlink(missing_ok=True)
        total = sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            if total <= self._limit:
                return
            if path != newest:
                path.unlink(missing_ok=True)
                total -= size
