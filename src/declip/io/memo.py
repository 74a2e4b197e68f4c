"""Cache of derived Arrow tables: one process builds a table, all memory-map it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from filelock import FileLock

from declip.io.atomic import atomic_write, cache_folder

LOCKS = 64  # number of lock files of a kind; tables that share one wait for each other


def cached_table(
    kind: str, version: object, make: Callable[[], tuple[pa.Schema, Iterable[pa.RecordBatch]]]
) -> pa.Table:
    """Memory-map a table from the folder `kind` of the cache; if it is missing, `make` builds it.

    `version` identifies everything that the table depends on, by its `repr`.
    """
    name = hashlib.sha256(repr(version).encode(errors="surrogateescape")).hexdigest()[:32]
    target = cache_folder() / kind / f"{name}.arrow"
    if (table := _mapped(target)) is not None:
        return table
    with locked(Path(kind).name, name):
        if (table := _mapped(target)) is None:
            with atomic_write(target) as partial:
                schema, batches = make()
                with pa.ipc.new_file(str(partial), schema) as writer:
                    for batch in batches:
                        writer.write_batch(batch)
            pa.default_memory_pool().release_unused()
            table = _mapped(target)
        assert table is not None
        return table


def _mapped(path: Path) -> pa.Table | None:
    """Memory-map a table; None if the file is missing or truncated, as by a full disk or a power failure."""
    import torch  # takes seconds, which a command with a wrong path should not wait for

    with suppress(OSError, RuntimeError, ValueError, pa.ArrowException):
        # Torch's mapping, unlike those of NumPy and Arrow, keeps no file open; there may be a thousand.
        content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
        return pa.ipc.open_file(pa.py_buffer(content)).read_all()
    return None


@contextmanager
def locked(kind: str, name: str) -> Iterator[None]:
    """Lock a name in the cache for one process; a read-only cache is not locked, and the next write reports it.

    Locks of different kinds may be nested. The name starts with hexadecimal digits.
    """
    folder = cache_folder() / "locks"
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / f"{kind}-{int(name[:8], 16) % LOCKS}.lock"))
        yield
