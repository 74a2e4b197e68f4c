"""Feature rows on disk, found by a key: computed once, appended in blocks, read through a memory map."""

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from declip.errors import UserError
from declip.io.atomic import FULL

KEY = 16  # bytes of a key


class FeatureStore:
    """Rows of numbers by key, in two files that only grow: the keys, and the rows in the same order.

    The rows of a block are written before its keys, so a process that is killed loses at most the last block. One
    process at a time may append; call `refresh` first where another one may have.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype) -> None:
        self.width, self.dtype, self._bytes = width, dtype, width * dtype.itemsize
        self._keys, self._rows = folder / "keys", folder / "rows"
        folder.mkdir(parents=True, exist_ok=True)
        for path in (self._keys, self._rows):
            path.touch()
        os.utime(folder)  # `declip.io.cache` removes what was opened longest ago
        self._count, self._places = 0, dict[bytes, int]()
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    def refresh(self) -> None:
        """Read the keys that were appended since the last call, by any process."""
        count = min(self._keys.stat().st_size // KEY, self._rows.stat().st_size // self._bytes)
        if count <= self._count:
            return
        with self._keys.open("rb") as file:
            file.seek(KEY * self._count)
            stored = file.read(KEY * (count - self._count))
        for number in range(self._count, count):
            start = KEY * (number - self._count)
            self._places[stored[start : start + KEY]] = number
        self._count = count

    def append(self, keys: list[bytes], rows: Tensor) -> None:
        """Write new rows (n, width) under their keys; if the disk is full, earlier rows stay valid."""
        content = rows.to(self.dtype).contiguous().cpu().view(torch.uint8).numpy().tobytes()
        try:
            # Rows first: a key without its row would be read as a neighbor's.
            for path, size, block in ((self._rows, self._bytes, content), (self._keys, KEY, b"".join(keys))):
                with path.open("r+b") as file:
                    file.truncate(self._count * size)
                    file.seek(self._count * size)
                    file.write(block)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(
                f"No room left on the disk for features in '{self._rows}'. Free some with `declip cache clear`, or set "
                "DECLIP_CACHE to a folder on another disk."
            ) from error
        self._places |= {key: self._count + number for number, key in enumerate(keys)}
        self._count += len(keys)

    def places(self, keys: Iterable[bytes]) -> np.ndarray:
        """The row numbers of keys, (n,) int64."""
        return np.fromiter((self._places[key] for key in keys), np.int64)

    def rows(self) -> Tensor:
        """All rows, (n, width), mapped from the disk."""
        if not self._count:
            return torch.empty(0, self.width, dtype=self.dtype)
        with self._rows.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), self._count * self._bytes, access=mmap.ACCESS_COPY)
        return torch.frombuffer(mapped, dtype=self.dtype).view(self._count, self.width)
