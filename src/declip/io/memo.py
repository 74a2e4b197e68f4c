"""Cache a derived table as Arrow, once per version of its file; one process builds it, all memory-map it."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import torch
from filelock import FileLock

from declip.io.atomic import atomic_write, cache_folder

LOCKS = 64  # number of lock files of a kind; two tables may share one and then wait for each other


def cached_table(
    kind: str, version: object, make: Callable[[], tuple[pa.Schema, Iterable[pa.RecordBatch]]]
) -> pa.Table:
    """A table memory-mapped from the cache's folder `kind`, made first where it is missing.

    `version` is all that the table depends on; its `repr` counts.
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
    """The table in a file; None where it is missing, or was truncated when the disk was full or the power failed."""
    with suppress(OSError, RuntimeError, ValueError, pa.ArrowException):
        # Torch's map, unlike NumPy's and Arrow's, holds no open file, of which there may be a thousand.
        content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8).numpy()
        return pa.ipc.open_file(pa.py_buffer(content)).read_all()
    return None


@contextmanager
def locked(kind: str, name: str) -> Iterator[None]:
    """Let one process at a time in; all of them where the cache is read-only, which the write that follows reports.

    Locks of different kinds may be nested; the name begins with hexadecimal digits.
    """
    folder = cache_folder() / "locks"
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / f"{kind}-{int(name[:8], 16) % LOCKS}.lock"))
        yield
