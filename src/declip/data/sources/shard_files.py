"""Files of shards: found, opened, and copied to the cache where they are remote, through fsspec."""

import hashlib
import importlib
import json
import os
import stat
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from declip.data.sources.names import expand, is_url
from declip.errors import UserError
from declip.io.atomic import FULL, atomic_write, cache_folder
from declip.io.cache import locked, trim_cache

T = TypeVar("T")

OPEN_FILES = 64  # local shards that a process keeps open; opening one on a network file system takes milliseconds
LAYOUT = 5  # raised when the index of a shard changes its meaning
COPIES = "shards/copies"  # folder of the cache
REQUESTS = 16  # concurrent requests for the size of a shard
TRIES = 3  # of a request
PAUSE = 1.0  # seconds before the second try, twice as many before the third
RESTING = 60.0  # seconds before a shard that could not be fetched is tried again: each of its pairs would wait
# WebDataset's and open_clip's file next to the shards with the number of pairs of each; its largest size in bytes.
SIZES = "sizes.json"
LARGEST_SIZES = 64 << 20


class UnreadableShard(Exception):
    """A shard cannot be read; the message is the reason, in one line."""


class OpenFile:
    """An open file, closed when unused. If it was cut short, `read` returns less; a memory map ends the process."""

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        # Unlike `__del__` it also works at the end of Python
        weakref.finalize(self, os.close, self._descriptor)
        self.size = os.fstat(self._descriptor).st_size  # bytes

    def read(self, size: int, at: int) -> bytes:
        """Read bytes, fewer at the end, without moving the position that forked processes share."""
        return os.pread(self._descriptor, size, at)


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
        """The last part of the name, without a URL's query, which may be a signature."""
        name = self.name
        if self.remote:
            name = name.partition("?")[0]
        return os.path.basename(name)


def find_shards(word: str) -> list[Shard]:
    """Look up the shards that a word names (see `expand`), in order."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        found = pool.map(partial(_retry, look_up), expand(word))
        return list(chain.from_iterable(found))


def _shard(name: str, path: str, size: int, version: str) -> Shard:
    state = repr((LAYOUT, path, size, version)).encode(errors="surrogateescape")
    return Shard(name, size, hashlib.sha256(state).hexdigest()[:32])


@contextmanager
def _file_system(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path on it; errors, which differ by system, become `UnreadableShard`."""
    try:
        core = importlib.import_module("fsspec.core")
        # Requested each time: fsspec then returns a new one in a forked process
        yield core.url_to_fs(url)
    except ImportError as error:
        needed = "pip install 'declip[remote]', and the package for this URL (s3fs, gcsfs, huggingface_hub for hf)"
        raise UserError(f"Reading '{url}' requires fsspec: {needed}.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        line, *_ = str(error).strip().splitlines() or [""]
        cause = f"{type(error).__name__}: {line[:300].rstrip('.')}"
        raise UnreadableShard(f"{url}: {cause}") from error


def _retry(work: Callable[..., T], *arguments: Any) -> T:
    """Call a function up to `TRIES` times: one of many requests may fail."""
    for trial in range(1, TRIES):
        try:
            return work(*arguments)
        except UnreadableShard:
            time.sleep(PAUSE * 2 ** (trial - 1))
    return work(*arguments)


def look_up(url: str) -> list[Shard]:
    """The shard of a path, or those of a URL: one file, those of a pattern, or a folder's .tar files."""
    if not is_url(url):
        status = os.stat(url)
        if not stat.S_ISREG(status.st_mode):  # a named pipe blocks on open
            raise UnreadableShard(f"{url} is not a file")
        path = str(Path(url).resolve())
        return [_shard(url, path, status.st_size, str(status.st_mtime_ns))]
    with _file_system(url) as (system, path):
        one_file = path.partition("?")[0].lower().endswith((".tar", ".gz", ".tgz"))
        if "*" in path or not one_file:
            pattern = path
            if "*" not in path:
                pattern = f"{path.rstrip('/')}/*.tar"
            globbed = system.glob(pattern, detail=True)
            files = {system.unstrip_protocol(name): info for name, info in sorted(globbed.items())}
        else:
            files = {url: system.info(path)}
        if not files:
            raise FileNotFoundError(
                "no .tar file; Parquet files are read from a folder on this machine"
            )
    shards = []
    for name, info in files.items():
        # The address that a redirect led to is left out: it is often signed again each time.
        version = {key: info[key] for key in info if key != "url"}
        shards.append(_shard(name, name, int(info.get("size") or 0), str(version)))
    return shards


def fetch(url: str, target: Path, size: int) -> None:
    """Copy a remote file of `size` bytes (0: unknown); raises `UnreadableShard`, or OSError if the disk is full."""
    with _file_system(url) as (system, path):
        system.get_file(path, str(target))
        received = target.stat().st_size
        if size and received != size:
            raise EOFError(f"{received:,} of {size:,} bytes received")


def counts(folder: str) -> dict[str, int]:
    """The number of pairs by a shard's last name, from `SIZES` in a remote folder; empty if it is missing."""
    with _file_system(f"{folder}/{SIZES}") as (system, path):
        if not system.exists(path):
            return {}
        sizes: dict[str, int] = json.loads(system.cat_file(path, 0, LARGEST_SIZES))
        for count in sizes.values():
            if not isinstance(count, int) or not 0 <= count < 2**31:
                raise ValueError("not a number of pairs for each shard; fix or remove it")
        return sizes


# Opens a shard on this machine, or returns the open file.
open_local = lru_cache(OPEN_FILES)(lambda shard: OpenFile(shard.name))


def open_shard(shard: Shard) -> OpenFile:
    """Open a shard, or the copy of a remote one; raises `UnreadableShard`, and `UserError` if the disk is full."""
    try:
        # A copy is not kept open: it takes room on the disk until the last process closes it.
        if shard.remote:
            return _copy(shard)
        return open_local(shard)
    except OSError as error:
        raise UnreadableShard(f"{shard.name}: {error.strerror or error}") from error


# Time of the last try and reason, by the state of a shard
_failed: dict[str, tuple[float, str]] = {}


def _copy(shard: Shard) -> OpenFile:
    path = cache_folder() / COPIES / f"{shard.state}.tar"
    with suppress(FileNotFoundError):
        os.utime(path)  # the time of its last use, for `trim_cache`
        return OpenFile(path)
    since, reason = _failed.get(shard.state, (-RESTING, ""))
    if time.monotonic() - since < RESTING:
        raise UnreadableShard(reason)
    with locked("copies", shard.state):
        with suppress(FileNotFoundError):
            return OpenFile(path)  # fetched by another thread or process in the meantime
        try:
            with atomic_write(path) as partial:
                _retry(fetch, shard.name, partial, shard.size)
                # Another process may remove the copy as soon as it has its name
                opened = OpenFile(partial)
        except UnreadableShard as error:
            _failed[shard.state] = time.monotonic(), str(error)
            raise
    with suppress(FileNotFoundError):  # another process makes room, too
        trim_cache(COPIES, keep=[path])
    return opened
