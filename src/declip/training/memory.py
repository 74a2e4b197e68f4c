"""Memory beside a training loop: Python's garbage collection, and the C library's freed blocks."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of glibc's mallopt."""

USUAL = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20, MMAP_MAX: 65_536}
KEEP = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}
"""Where glibc's own values go in a process that frees large blocks, and those with which it returns nothing to the
system and asks it for nothing twice. Once set, they no longer go anywhere by themselves."""


@contextmanager
def frozen_garbage() -> Iterator[None]:
    """Leave all objects that are there now out of every collection, until the end: only what steps make is looked at.

    A full collection visits each of some 300,000 objects of torch, timm and the model for nothing, in the middle of a
    step.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def kept_memory() -> Iterator[None]:
    """Let the C library keep freed blocks until the end, for the next step to use. Only glibc is asked; others pass.

    A step allocates and frees hundreds of large blocks. glibc gives each back to the system at once and gets it again
    page by page, zeroed: a tenth of a small step on a CPU.
    """
    library = _glibc()
    if library is None:
        yield
        return
    for parameter, value in KEEP.items():
        library.mallopt(parameter, value)
    try:
        yield
    finally:
        for parameter, value in USUAL.items():
            library.mallopt(parameter, value)
        library.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "mallopt") else None
