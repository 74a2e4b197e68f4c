"""Cache a user's table as Arrow, once per file version; one process builds it, all memory-map it."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from declip.io.atomic import atomic_write, cache_folder


def cached_table(source: Path, kind: str, options: object, make: Callable[[Path], None]) -> pa.Table:
    """The table derived from `source`, memory-mapped from the cache; built first if the file is new or has changed.

    Args:
        source: The file; its path, size and time of change identify its version.
        kind: Name of the folder in the cache.
        options: Everything else that the result depends on; its `repr` counts.
        make: Writes an Arrow file to a path.
    """
    status = source.stat()
    version = repr((str(source.resolve()), status.st_size, status.st_mtime_ns, options))
    name = hashlib.sha256(version.encode(errors="surrogateescape")).hexdigest()[:16]
    target = cache_folder() / kind / f"{name}.arrow"
    with suppress(OSError, pa.ArrowException):  # missing, or truncated when the disk was full or the power failed
        return _mapped(target)
    with locked(f"{kind}-{name}"):
        with suppress(OSError, pa.ArrowException):
            return _mapped(target)
        with atomic_write(target) as partial:
            make(partial)
        pa.default_memory_pool().release_unused()
        return _mapped(target)


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process at a time in; all of them where the cache is read-only, which the write that follows reports."""
    folder = cache_folder() / "locks"
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / f"{name}.lock"))
        yield
