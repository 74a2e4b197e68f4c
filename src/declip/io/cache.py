"""The size of the cache folder: what is in it, and what is removed when it grows too large."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from declip.errors import UserError, unknown
from declip.io.atomic import cache_folder, remove

LOCK = ".lock"
FEATURES, SHARDS, HEADS = "features", "shards", "heads"
COMPUTED = (FEATURES, SHARDS, HEADS, "tables")
"""Folders of the cache whose content is computed or copied again when it is missing."""

LIMIT_VARIABLE, LIMIT_GB = "DECLIP_CACHE_GB", 50.0


@dataclass(frozen=True)
class Entry:
    """A file or folder directly in one of the cache's folders."""

    path: Path
    size: int  # bytes
    used: float  # seconds since the epoch; the last time it was opened or written


def cache_entries() -> list[Entry]:
    """All entries of the cache but its locks, by folder and name."""
    folders = (path for path in sorted(cache_folder().glob("*")) if path.is_dir() and path.name != "locks")
    return [_entry(path) for folder in folders for path in sorted(folder.iterdir())]


def clear_cache(folder: str | None = None) -> int:
    """Remove the entries of a folder of the cache, or of all of `COMPUTED`, and return the number of bytes freed.

    Entries that a process holds stay.
    """
    entries = cache_entries()
    names = dict.fromkeys(entry.path.parent.name for entry in entries)
    if folder is not None and folder not in names:
        raise unknown("folder of the cache", folder, names)
    wanted = COMPUTED if folder is None else (folder,)
    return sum(entry.size for entry in entries if entry.path.parent.name in wanted and _removed(entry))


def trim_cache(keep: Iterable[Path] = ()) -> None:
    """Remove features, longest unused first, until they have at most DECLIP_CACHE_GB; never those to keep."""
    kept, limit = {*keep}, cache_limit()
    entries = [entry for entry in cache_entries() if entry.path.parent.name == FEATURES]
    total = sum(entry.size for entry in entries)
    for entry in sorted(entries, key=lambda entry: entry.used):
        if total <= limit:
            return
        if entry.path not in kept and _removed(entry):
            total -= entry.size


def cache_limit() -> float:
    """The largest size of the features in the cache, in bytes."""
    given = os.environ.get(LIMIT_VARIABLE) or str(LIMIT_GB)
    try:
        limit = float(given)
    except ValueError:
        limit = -1.0
    if not limit >= 0:
        raise UserError(f"{LIMIT_VARIABLE}={given} is not a number of gigabytes. Set it to 0 or more.")
    return limit * 1e9


def _entry(path: Path) -> Entry:
    files = [path, *path.rglob("*")] if path.is_dir() else [path]
    stats = [file.stat() for file in files if file.exists()]
    sizes = sum(stat.st_size for stat, file in zip(stats, files, strict=False) if not file.is_dir())
    return Entry(path, sizes, max((stat.st_mtime for stat in stats), default=0.0))


def _removed(entry: Entry) -> bool:
    """Remove an entry unless a process holds its lock; return whether it was removed."""
    lock = entry.path / LOCK
    try:
        if lock.exists():
            with FileLock(lock, timeout=0):
                remove(entry.path)
        else:
            remove(entry.path)
    except (Timeout, OSError):
        return False
    return not entry.path.exists()
