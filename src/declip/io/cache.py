"""The cache folder: what it holds, and derived Arrow tables, which one process builds and all memory-map."""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import IO, NamedTuple

import pyarrow as pa

from declip.errors import UserError, unknown
from declip.io.atomic import atomic_write, cache_folder, file_lock, remove

LOCK = ".lock"
FEATURES = "features"
HEADS = "heads"
# Folders of the cache whose content is computed or copied again when it is missing.
COMPUTED = (FEATURES, HEADS, "orders", "shards", "tables")


class Entry(NamedTuple):
    """A file or folder directly in one of the cache's folders."""

    path: Path
    size: int  # bytes
    used: float  # seconds since the epoch; the last time it was opened or written


def cache_entries() -> list[Entry]:
    """All entries of the cache but its locks, by folder and name."""
    folders = sorted(path for path in cache_folder().glob("*") if path.name != "locks")
    return [entry for folder in folders for entry in _entries(folder)]


def clear_cache(folder: str | None = None) -> int:
    """Remove unused entries of a folder of the cache, or of all of `COMPUTED`; return the number of bytes freed."""
    entries = cache_entries()
    names = dict.fromkeys(entry.path.parent.name for entry in entries)
    if folder is not None and folder not in names:
        raise unknown("folder of the cache", folder, names)
    wanted = COMPUTED if folder is None else (folder,)
    return sum(
        entry.size for entry in entries if entry.path.parent.name in wanted and _remove(entry.path)
    )


def trim_cache(folder: str, keep: Iterable[Path]) -> None:
    """Remove entries of a folder, longest unused first, until DECLIP_CACHE_GB is enough; never those to keep."""
    given = os.environ.get("DECLIP_CACHE_GB", "50")
    kept = {*keep}
    try:
        limit = float(given) * 1e9
    except ValueError as error:
        raise UserError(
            f"DECLIP_CACHE_GB is '{given}'; set it to 10^9 bytes, such as 50."
        ) from error
    entries = [
        entry for entry in _entries(cache_folder() / folder) if not entry.path.name.startswith(".")
    ]
    total = sum(entry.size for entry in entries)
    for entry in sorted(entries, key=lambda entry: entry.used):
        if total > limit and entry.path not in kept and _remove(entry.path):
            total -= entry.size


def _entries(folder: Path) -> list[Entry]:
    """The entries of a folder of the cache, by name; other processes may remove files meanwhile."""
    entries = []
    for path in sorted(folder.glob("*")):
        inner = [Path(parent, name) for parent, *names in os.walk(path) for name in chain(*names)]
        size = 0
        used = None
        for file in (path, *inner):
            with suppress(OSError):
                status = file.stat()
                if stat.S_ISREG(status.st_mode):
                    size += status.st_size
                used = max(used or 0.0, status.st_mtime)
        if used is not None:
            entries.append(Entry(path, size, used))
    return entries


def hold(folder: Path) -> IO[bytes] | None:
    """Create a folder of the cache; no process removes it while the file that this returns is open.

    None where there can be no such lock: on Windows, in a read-only cache, on a file system without locks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl

        file = (folder / LOCK).open("ab")
        fcntl.flock(file, fcntl.LOCK_SH)
    except (ImportError, OSError):
        return None
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), (folder / LOCK).stat()):
            return file
    file.close()  # the folder was removed since it was opened
    return hold(folder)


def _remove(path: Path) -> bool:
    """Remove an entry unless a process holds its lock; return whether it was removed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.old")
    # Renamed first: a process that creates the folder again must not lose what it writes.
    with (
        suppress(OSError),
        file_lock(path / LOCK, timeout=0) if (path / LOCK).exists() else nullcontext(),
    ):
        path.rename(aside)
        remove(aside)
        return True
    return False


def cached_table(
    kind: str, version: object, make: Callable[[], tuple[pa.Schema, Iterable[pa.RecordBatch]]]
) -> pa.Table:
    """Memory-map a table from the folder `kind` of the cache, built by `make` once for the `repr` of a version."""
    target = table_path(kind, version)
    table = _open_mapped(target)
    if table is not None:
        return table
    with locked(Path(kind).name, target.name):
        table = _open_mapped(target)
        if table is None:
            with atomic_write(target) as partial:
                schema, batches = make()
                with pa.ipc.new_file(str(partial), schema) as writer:
                    for batch in batches:
                        writer.write_batch(batch)
            pa.default_memory_pool().release_unused()
            table = _open_mapped(target)
        assert table is not None
        return table


def table_path(kind: str, version: object) -> Path:
    """Path of a table of `cached_table`."""
    text = repr(version).encode(errors="surrogateescape")
    digest = hashlib.sha256(text).hexdigest()
    return cache_folder() / kind / f"{digest[:32]}.arrow"


def _open_mapped(path: Path) -> pa.Table | None:
    """Memory-map a table; None if the file is missing or truncated, as by a full disk or a power failure."""
    import torch  # takes seconds, which a command with a wrong path should not wait for

    with suppress(OSError, RuntimeError, ValueError, pa.ArrowException):
        # Torch's mapping, unlike those of NumPy and Arrow, keeps no file open; there may be a thousand.
        content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
        return pa.ipc.open_file(pa.py_buffer(content)).read_all()
    return None


@contextmanager
def locked(kind: str, name: str) -> Iterator[None]:
    """Lock a name that starts with hexadecimal digits for one process; not in a read-only cache."""
    folder = cache_folder() / "locks"
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            # 256 lock files of a kind; names that share one wait for each other.
            stack.enter_context(file_lock(folder / f"{kind}-{name[:2]}.lock"))
        yield
