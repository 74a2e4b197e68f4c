"""Tables made from a user's file once for each of its states, by one process while others wait, and mapped by all."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from declip.io.atomic import atomic_write, cache_folder


def cached_table(source: Path, kind: str, made_of: object, make: Callable[[Path], None]) -> pa.Table:
    """The table in the cache that is made from `source`, made now where there is none for its present state.

    Args:
        source: The file; its path, size and time of change are its state.
        kind: The folder in the cache.
        made_of: What else the result depends on; its `repr` counts.
        make: Writes an Arrow file to the path that it is given.

    Returns:
        The table, mapped into memory and so shared by all processes.

    Raises:
        UserError: The cache cannot be written to.
    """
    status = source.stat()
    state = repr((str(source.resolve()), status.st_size, status.st_mtime_ns, made_of))
    name = hashlib.sha256(state.encode(errors="surrogateescape")).hexdigest()[:16]
    target = cache_folder() / kind / f"{name}.arrow"
    with suppress(OSError, pa.ArrowException):  # not there, or cut short when a disk was full or the power failed
        return _mapped(target)
    with locked(f"{kind}-{name}"):
        with suppress(OSError, pa.ArrowException):
            return _mapped(target)
        with atomic_write(target) as beside:
            make(beside)
        # What was held to make it goes back to the system.
        pa.default_memory_pool().release_unused()
        return _mapped(target)


def _mapped(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let one process at a time in; all at once where the cache cannot be written to, which what follows will say."""
    folder = cache_folder() / "locks"
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / f"{name}.lock"))
        yield
