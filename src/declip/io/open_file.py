"""A file that several forked processes can read at any place at the same time."""

import os
from pathlib import Path


class OpenFile:
    """An open file, closed when nothing refers to it any more."""

    def __init__(self, path: str | Path) -> None:
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDONLY)

    @property
    def size(self) -> int:
        """Bytes."""
        return os.fstat(self._descriptor).st_size

    def read(self, size: int, at: int) -> bytes:
        """Read bytes, fewer at the end, without moving the position that forked processes share."""
        return os.pread(self._descriptor, size, at)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
