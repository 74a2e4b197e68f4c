"""The index of a tar shard: where each pair's image and captions lie, made once, kept in the cache, read by map."""

import re
from array import array
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from declip.data.images.decode import EXTENSIONS
from declip.data.sources.tar_members import DamagedTar, Member, members
from declip.errors import UserError
from declip.io.atomic import atomic_write, cache_folder
from declip.io.memo import locked
from declip.io.open_file import OpenFile

PARTS = ("image", "text", "json")
KINDS = {ending.removeprefix("."): 0 for ending in EXTENSIONS} | {"txt": 1, "json": 2}
"""The place in `PARTS` of each ending."""

SAMPLE = re.compile(rb"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
"""A key and its ending as WebDataset tells them apart: at the first dot of the name's last part."""

IMAGES = ("jpg", "png", "jpeg", "webp")
"""Which image of a key is read where it has several, first to last, as open_clip does; then all others."""

RANKS = {ending: rank for rank, ending in enumerate(dict.fromkeys((*IMAGES, *KINDS)))}

LOCKS = 64
"""Lock files for all indices together."""

LARGEST = 2**31 - 1
"""Bytes written for a larger member; neither is read."""

SCHEMA = pa.schema(
    [("key", pa.large_binary())]
    + [field for part in PARTS for field in ((f"{part}_at", pa.int64()), (f"{part}_size", pa.int32()))]
)
DAMAGE = b"damage"
"""Under this name the schema of a damaged shard's index says what is wrong with it; its last row stands for the pairs
that are lost."""


class Index:
    """The pairs of a shard, in the order in which the shard first names them.

    Args:
        batch: As `scan` makes it.
    """

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._keys = batch.column("key")
        self._at = [batch.column(f"{part}_at").to_numpy() for part in PARTS]
        self._sizes = [batch.column(f"{part}_size").to_numpy() for part in PARTS]
        damage = (batch.schema.metadata or {}).get(DAMAGE)
        self.damage: str | None = None if damage is None else damage.decode()
        """What is wrong with the shard; the last row then stands for what is lost."""

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, row: int) -> str:
        """The pair's key; bytes that are not UTF-8 are shown as such."""
        return self._keys[row].as_py().decode(errors="backslashreplace")

    def part(self, row: int, name: str) -> tuple[int, int] | None:
        """Where the "image", "text" or "json" of a pair begins and how many bytes it has; None where there is none."""
        place = PARTS.index(name)
        at = int(self._at[place][row])
        return None if at < 0 else (at, int(self._sizes[place][row]))


def make_index(file: OpenFile, name: str, state: str) -> Index:
    """Scan a shard and keep its index in the cache.

    Args:
        file: The open shard.
        name: Of the shard, for errors.
        state: Tells this shard in its present state from every other, in characters that a file name may have.

    Raises:
        UserError: It cannot be read at all, is compressed, or the cache cannot be written to.
    """
    batch = scan(file, name)
    with atomic_write(_place(state)) as beside, pa.ipc.new_file(str(beside), batch.schema) as writer:
        writer.write_batch(batch)
    return Index(batch)


def cached_index(state: str) -> Index | None:
    """The index that was made earlier, mapped into memory and so shared by all processes; None where there is none."""
    place = _place(state)
    with suppress(OSError, RuntimeError, ValueError, pa.ArrowException):
        # Torch's map, unlike NumPy's and Arrow's, holds no open file, of which there may be a thousand.
        mapped = torch.from_file(str(place), size=place.stat().st_size, dtype=torch.uint8).numpy()
        return Index(pa.ipc.open_file(pa.py_buffer(mapped)).get_batch(0))
    return None


def index_lock(state: str) -> AbstractContextManager[None]:
    """Held while an index is made, so that the ranks of a run don't all read the same shard."""
    return locked(f"index-{int(state[:8], 16) % LOCKS}")


def _place(state: str) -> Path:
    return cache_folder() / "shards" / "index" / f"{state}.arrow"


def scan(file: OpenFile, name: str) -> pa.RecordBatch:
    """Find the pairs of a shard.

    Members of one key are a pair wherever they stand. Of images with different endings one is read, see `IMAGES`. A
    second image of the same ending, text or JSON of a key begins another pair. A name such as "IMG_1.2.jpg", whose key
    would be "IMG_1" and its ending "2.jpg", is a row without any part, so that it is counted.

    Args:
        file: The open shard.
        name: Of the shard, for errors.

    Returns:
        A row for each pair (see `SCHEMA`), -1 where a part is missing; in a damaged shard one more.

    Raises:
        UserError: The shard cannot be read, is compressed, or is damaged before the first pair.
    """
    rows = _Rows()
    damage: str | None = None
    try:
        rows.add_all(members(file))
    except DamagedTar as error:
        damage = str(error)
    except OSError as error:
        raise UserError(f"The shard '{name}' cannot be read: {error.strerror}.") from error
    rows.add_dotted()
    if damage is None:
        return rows.to_arrow(SCHEMA)
    if damage.startswith("compressed"):
        raise UserError(
            f"The shard '{name}' is {damage}, so its pairs cannot be read one by one. Unpack it once (gunzip, "
            "bunzip2, unxz, unzstd); images are compressed already."
        )
    if not len(rows):
        raise UserError(f"The shard '{name}' is no tar archive that can be read: {damage}. Fetch or write it anew.")
    rows.add_lost()
    return rows.to_arrow(SCHEMA.with_metadata({DAMAGE: damage.encode()}))


class _Rows:
    """The rows of an index while it grows, as flat arrays."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.latest: dict[bytes, int] = {}
        self.at = [array("q") for _ in PARTS]
        self.sizes = [array("i") for _ in PARTS]
        self.ranks = array("b")  # of each row's image, by `RANKS`
        self.dotted: dict[tuple[bytes, bytes], set[int]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def add_all(self, found: Iterable[Member]) -> None:
        for name, at, size in found:
            match = SAMPLE.fullmatch(name)
            if match is None:
                continue
            dotted, _, ending = match[2].decode(errors="replace").lower().rpartition(".")
            kind = KINDS.get(ending)
            if kind is None:
                continue
            if dotted:
                self.dotted.setdefault((match[1], name.rpartition(b".")[0]), set()).add(kind)
                continue
            row, rank = self.latest.get(match[1]), RANKS.get(ending, 0)
            if row is not None and kind == 0 and self.at[0][row] >= 0 and rank != self.ranks[row]:
                if rank > self.ranks[row]:
                    continue
            elif row is None or self.at[kind][row] >= 0:
                row = self._add(match[1])
            if kind == 0:
                self.ranks[row] = rank
            self.at[kind][row], self.sizes[kind][row] = at, min(size, LARGEST)

    def add_dotted(self) -> None:
        """Add images passed over for a dot in their key; one beside a pair's image and without a caption is a part of
        that pair, such as "1.seg.png"."""
        for (key, stem), kinds in self.dotted.items():
            if 0 in kinds and (len(kinds) > 1 or key not in self.latest):
                self._add(stem)

    def add_lost(self) -> None:
        self._add(b"")

    def _add(self, key: bytes) -> int:
        self.latest[key] = row = len(self.keys)
        self.keys.append(key)
        self.ranks.append(0)
        for column in (*self.at, *self.sizes):
            column.append(-1)
        return row

    def to_arrow(self, schema: pa.Schema) -> pa.RecordBatch:
        def columns() -> Iterator[pa.Array]:
            yield pa.array(self.keys, pa.large_binary())
            for at, sizes in zip(self.at, self.sizes, strict=True):
                yield pa.array(np.frombuffer(at, np.int64))
                yield pa.array(np.frombuffer(sizes, np.int32))

        return pa.record_batch(list(columns()), schema=schema)
