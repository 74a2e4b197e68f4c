"""Names of sources: patterns of shards, files on this machine or remote ones through fsspec, and paths in projects."""

import glob
import hashlib
import importlib
import json
import os
import re
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from declip.data.images.decode import EXTENSIONS
from declip.errors import UserError
from declip.io.atomic import FULL, atomic_write, cache_folder
from declip.io.cache import locked, trim_cache

T = TypeVar("T")

MOST_SHARDS = 1_000_000
BRACES, RANGE = re.compile(r"\{([^{}]*)\}"), re.compile(r"(\d{1,15})\.\.(\d{1,15})")
OPEN_FILES = 64  # local shards that a process keeps open; opening one on a network file system takes milliseconds
LAYOUT = 5  # raised when the index of a shard changes its meaning
COPIES = "shards/copies"  # folder of the cache
REQUESTS = 16  # concurrent requests for the size of a shard
TRIES, PAUSE = 3, 1.0  # of a request; seconds before the second try, twice as many before the third
RESTING = 60.0  # seconds before a shard that could not be fetched is tried again: each of its pairs would wait
# WebDataset's and open_clip's file next to the shards with the number of pairs of each; its largest size in bytes.
SIZES, LARGEST_SIZES = "sizes.json", 64 << 20


class UnreadableShard(Exception):
    """A shard cannot be read; the message is the reason, in one line."""


class OpenFile:
    """An open file, closed when unused. If it was cut short, `read` returns less; a memory map ends the process."""

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)  # unlike `__del__` it also works at the end of Python
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
        return (self.name.partition("?")[0] if self.remote else self.name).rpartition("/")[2]


def names_shards(word: str) -> bool:
    """Whether a word can only mean shards: a tar file, a URL or a pattern."""
    if is_url(word) or word.lower().endswith((".tar", ".tgz", ".tar.gz")):
        return True
    return any(sign in word for sign in "*?[{") and not Path(word).expanduser().exists()


def is_url(word: str) -> bool:
    """Whether a word is a URL rather than a path."""
    return "://" in word


def absolute(spec: str | Path) -> str:
    """The name of a source, model or folder that is valid in any working directory."""
    path = Path(spec).expanduser()
    if path.exists():
        return str(path.resolve())
    return os.path.abspath(path) if names_shards(str(spec)) and not is_url(str(spec)) else str(spec)


def holds(folder: Path, ending: str) -> bool:
    """Whether a folder has files with this ending and, directly in it, no image."""
    endings = {path.suffix.lower() for path in folder.iterdir() if not path.name.startswith(".")}
    return ending in endings and not endings & set(EXTENSIONS)


def files_in(folder: Path, ending: str) -> list[str]:
    """List the files of a folder with this ending, without hidden ones such as macOS's."""
    return sorted(str(file) for file in folder.glob("[!.]*") if file.suffix.lower() == ending)


def expand(word: str) -> list[str]:
    """List the paths and URLs of the shards that a word names; of a URL, only braces are expanded here."""
    shards: list[str] = []
    for name in [word] if not is_url(word) and Path(word).expanduser().exists() else _braces(word):
        path = Path(name).expanduser()
        if is_url(name) or path.is_file():
            files = [name if is_url(name) else str(path)]
        elif path.is_dir():
            files = files_in(path, ".tar")
        else:
            files = sorted(file for file in glob.glob(str(path), recursive=True) if Path(file).is_file())
        if not files:
            raise UserError(f"'{name}' does not exist. Fetch it, or name existing files.")
        shards += files
    return shards


def _braces(word: str) -> list[str]:
    """Expand `{000..331}` (padded like its first number) and `{a,b}` as a shell does."""
    braces = BRACES.search(word)
    if braces is None:
        return [word]
    choices = braces[1].split(",")
    if ends := RANGE.fullmatch(braces[1]):
        first, last = int(ends[1]), int(ends[2])
        if abs(last - first) >= MOST_SHARDS:
            raise UserError(f"'{word}' names more than {MOST_SHARDS:,} shards. Shorten its range.")
        step = 1 if first <= last else -1
        choices = [str(number).zfill(len(ends[1])) for number in range(first, last + step, step)]
    return [name for choice in choices for name in _braces(word.replace(braces[0], choice, 1))]


def find_shards(word: str) -> list[Shard]:
    """Look up the shards that a word names (see `expand`), in order."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return [shard for shards in pool.map(partial(_retried, look_up), expand(word)) for shard in shards]


def _shard(name: str, path: str, size: int, version: str) -> Shard:
    state = repr((LAYOUT, path, size, version)).encode(errors="surrogateescape")
    return Shard(name, size, hashlib.sha256(state).hexdigest()[:32])


@contextmanager
def _file_system(url: str) -> Iterator[tuple[Any, str]]:
    """The file system of a URL and the path on it; errors, which differ by system, become `UnreadableShard`."""
    try:
        core = importlib.import_module("fsspec.core")
        yield core.url_to_fs(url)  # requested each time: fsspec then returns a new one in a forked process
    except ImportError as error:
        needed = "pip install 'declip[remote]', and the package for this URL (s3fs, gcsfs, huggingface_hub for hf)"
        raise UserError(f"Reading '{url}' requires fsspec: {needed}.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        line = (str(error).strip().splitlines() or [""])[0][:300].rstrip(".")
        raise UnreadableShard(f"{url}: {type(error).__name__}: {line}") from error


def _retried(work: Callable[..., T], *arguments: Any) -> T:
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
        return [_shard(url, str(Path(url).resolve()), status.st_size, str(status.st_mtime_ns))]
    with _file_system(url) as (system, path):
        if "*" in path or not path.partition("?")[0].lower().endswith((".tar", ".gz", ".tgz")):
            pattern = path if "*" in path else f"{path.rstrip('/')}/*.tar"
            globbed = system.glob(pattern, detail=True)
            files = {system.unstrip_protocol(name): info for name, info in sorted(globbed.items())}
        else:
            files = {url: system.info(path)}
        if not files:
            raise FileNotFoundError("no .tar file; Parquet files are read from a folder on this machine")
    # Without the address that a redirect led to, which is often signed again each time.
    versions = {name: str({key: info[key] for key in info if key != "url"}) for name, info in files.items()}
    return [_shard(name, name, int(info.get("size") or 0), versions[name]) for name, info in files.items()]


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
        sizes = json.loads(system.cat_file(path, 0, LARGEST_SIZES)) if system.exists(path) else {}
        if not all(isinstance(count, int) and 0 <= count < 2**31 for count in sizes.values()):
            raise ValueError("not a number of pairs for each shard; fix or remove it")
        return sizes


# Opens a shard on this machine, or returns the open file.
open_local = lru_cache(OPEN_FILES)(lambda shard: OpenFile(shard.name))


def open_shard(shard: Shard) -> OpenFile:
    """Open a shard, or the copy of a remote one; raises `UnreadableShard`, and `UserError` if the disk is full."""
    try:
        # A copy is not kept open: it takes room on the disk until the last process closes it.
        return _copy(shard) if shard.remote else open_local(shard)
    except OSError as error:
        raise UnreadableShard(f"{shard.name}: {error.strerror or error}") from error


_failed: dict[str, tuple[float, str]] = {}  # time of the last try and reason, by the state of a shard


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
                _retried(fetch, shard.name, partial, shard.size)
                opened = OpenFile(partial)  # another process may remove the copy as soon as it has its name
        except UnreadableShard as error:
            _failed[shard.state] = time.monotonic(), str(error)
            raise
    with suppress(FileNotFoundError):  # another process makes room, too
        trim_cache(COPIES, keep=[path])
    return opened


def stored_path(given: object, folder: Path) -> str:
    """Path as a file in `folder` stores it: relative if both are in the working directory; "" for a Python object."""
    if not isinstance(given, str | Path) or not str(given):
        return ""
    return relative(absolute(given), folder)


def relative(path: str, folder: Path) -> str:
    """A path as `stored_path` stores it, without resolving links; anything but an absolute path stays."""
    project, place = os.getcwd(), str(folder.resolve())
    inside = all(os.path.isabs(one) and os.path.commonpath([one, project]) == project for one in (path, place))
    return os.path.relpath(path, place) if inside and not path.startswith(place + os.sep) else path


def resolve(path: str, folder: Path) -> str:
    """The absolute path of what `stored_path` stored; URLs and names such as builtin:emoji stay."""
    return os.path.normpath(folder.resolve() / path) if path.startswith(os.pardir + os.sep) else path


def is_missing(path: str) -> bool:
    """Whether this is an absolute path that does not exist, unlike a name such as open_clip:MODEL/TAG."""
    return os.path.isabs(path) and not names_shards(path) and not os.path.exists(path)
