"""What the cache folder holds, and removing it."""

from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from declip.errors import unknown
from declip.io.atomic import cache_folder, remove

LOCK = ".lock"
FEATURES, SHARDS, HEADS = "features", "shards", "heads"
# Folders of the cache whose content is computed or copied again when it is missing.
COMPUTED = (FEATURES, SHARDS, HEADS, "tables")


class Entry(NamedTuple):
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
    return sum(entry.size for entry in entries if entry.path.parent.name in wanted and _removed(entry.path))


def _entry(path: Path) -> Entry:
    stats = [(file, file.stat()) for file in (path, *path.rglob("*")) if file.exists()]
    size = sum(stat.st_size for file, stat in stats if file.is_file())
    return Entry(path, size, max((stat.st_mtime for _, stat in stats), default=0.0))


def _removed(path: Path) -> bool:
    """Remove an entry unless a process holds its lock; return whether it was removed."""
    try:
        if (path / LOCK).exists():
            with FileLock(path / LOCK, timeout=0):
                remove(path)
        else:
            remove(path)
    except (Timeout, OSError):
        return False
    return not path.exists()
