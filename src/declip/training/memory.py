"""Memory management around a training loop: Python's garbage collection, and the C library's freed blocks."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt."""

USUAL = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65_536}
"""The values that glibc itself reaches in a process that frees large blocks; once set, it adapts them no longer."""
KEEP = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}
"""With these glibc returns no memory to the system."""


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """`gc.freeze()` existing objects until the end, so that collections scan only the objects that steps allocate.

    A full collection would visit some 300,000 objects of torch, timm and the model in the middle of a step.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep freed blocks for the next step until the end; other C libraries are left alone.

    A step allocates and frees hundreds of large blocks. glibc returns each to the system at once and gets it again page
    by page, zeroed: a tenth of a small step on a CPU.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not (hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt")):
        yield
        return
    assert library is not None
    for parameter, value in KEEP.items():
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in USUAL.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)
