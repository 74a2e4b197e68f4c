"""A cache of the vectors that a tower computes: one SQLite file for each tower and precision.

Search, fine-tuning, classification and the app share it, so that an image is encoded once.
"""

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress

import numpy as np
import torch
from torch import Tensor

from declip.errors import UserError
from declip.io.atomic import cache_folder
from declip.io.cache import FEATURES, hold, trim_cache

FILE = "vectors.sqlite"
KEY_BYTES = 16
AT_ONCE = 500  # keys of a query: SQLite limits the number of its parameters


class VectorCache:
    """Vectors of inputs by key; the tower runs only on inputs that are missing.

    Each call commits what it computed, so that a killed process loses one batch. Several processes may share a cache.

    Args:
        name: What determines the vectors besides the input: the digest of the tower, and the precision.
    """

    def __init__(self, name: str) -> None:
        self.folder = cache_folder() / FEATURES / name
        with self._database():
            self._held = hold(self.folder)  # no other process removes the folder meanwhile
        with suppress(OSError):  # of a read-only cache
            os.utime(self.folder)  # the cache removes first what was opened longest ago
        trim_cache(FEATURES, keep=[self.folder])

    def find(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The saved vectors, float32 as bytes, of those keys that have one."""
        found: dict[bytes, bytes] = {}
        with self._database() as file:
            for start in range(0, len(keys), AT_ONCE):
                some = keys[start : start + AT_ONCE]
                marks = ",".join("?" * len(some))
                query = f"SELECT key, row FROM vectors WHERE key IN ({marks})"
                found.update(file.execute(query, some))
        return found

    def add(self, keys: Sequence[bytes], vectors: Tensor) -> dict[bytes, bytes]:
        """Save vectors (n, w) by their keys, and return them as bytes."""
        rows = vectors.float().cpu().numpy()
        added = {key: row.tobytes() for key, row in zip(keys, rows, strict=True)}
        with self._database() as file:
            file.executemany("INSERT OR IGNORE INTO vectors VALUES (?, ?)", added.items())
        return added

    def of(self, keys: Sequence[bytes], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """Vectors (n, w) float32 of inputs with these keys.

        Args:
            compute: Positions of the inputs whose vectors are missing → their vectors (m, w).
        """
        known = self.find(keys)
        missing: dict[bytes, int] = {}
        for position, key in enumerate(keys):
            if key not in known:
                missing.setdefault(key, position)
        if missing:
            vectors = compute(list(missing.values()))
            known |= self.add(list(missing), vectors)
        return stack_rows([known[key] for key in keys])

    @contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        """A transaction: what a killed process did not finish is undone by the next one."""
        try:
            # The folder may have been removed from outside, which costs the vectors and not the run
            self.folder.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(self.folder / FILE, timeout=60)) as file, file:
                columns = "(key BLOB PRIMARY KEY, row BLOB NOT NULL)"
                file.execute(f"CREATE TABLE IF NOT EXISTS vectors {columns}")
                yield file
        except (sqlite3.Error, OSError) as error:
            raise UserError(
                f"The cached vectors in '{self.folder}' cannot be read or written: {error}. Make "
                "room on the disk, run `declip cache clear`, or set DECLIP_CACHE to a folder on "
                "another disk."
            ) from error


def stack_rows(rows: Sequence[bytes]) -> Tensor:
    """Vectors (n, w) float32 from their bytes."""
    content = bytearray(b"".join(rows))
    return torch.frombuffer(content, dtype=torch.float32).view(len(rows), -1)


def content_key(pixels: np.ndarray) -> bytes:
    """Key of an image by its pixels."""
    # SHA-256: processors compute it in half the time of BLAKE2
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(np.ascontiguousarray(pixels).view(np.uint8).data)
    return digest.digest()[:KEY_BYTES]


def text_key(ids: Tensor, padding: int) -> bytes:
    """Key of a text by its token ids (L,), without the padding at their end."""
    row = ids.numpy()
    last = int(np.flatnonzero(row != padding).max(initial=-1))
    content = row[: last + 1].tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def stamp_key(stamp: str) -> bytes:
    """Key of an image by the stamp of its origin."""
    return hashlib.blake2b(stamp.encode(), digest_size=KEY_BYTES).digest()
