"""A file that is read by position: safe to share between forked processes, and without a memory map."""

import os
import weakref
from pathlib import Path


class OpenFile:
    """An open file, closed when nothing refers to it any more.

    Unlike a memory map, which ends the process where the file is cut short, `read` then returns fewer bytes.
    """

    def __init__(self, path: str | Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)  # unlike `__del__` it also works at the end of Python

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._descriptor).st_size

    @property
    def stamp(self) -> tuple[int, int]:
        """Size in bytes and time of the last change in ns; other values mean that the content was rewritten."""
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns

    def read(self, size: int, at: int) -> bytes:
        """Read bytes, fewer at the end, without moving the position that forked processes share."""
        return os.pread(self._descriptor, size, at)
