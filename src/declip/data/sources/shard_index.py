"""The index of a tar shard: the place of each pair's image and captions, built once and memory-mapped."""

import re
from array import array
from collections.abc import Iterable
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
"""Index into `PARTS` by extension."""

SAMPLE = re.compile(rb"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
"""A key and its extension, split as WebDataset does: at the first dot of the name's last part."""

IMAGES = ("jpg", "png", "jpeg", "webp")
"""Preferred images of a key that has several, as open_clip prefers them; then all others."""

RANKS = {ending: rank for rank, ending in enumerate(dict.fromkeys((*IMAGES, *KINDS)))}

LOCKS = 64
"""Number of lock files for all indices."""

LARGEST = 2**31 - 1
"""Size recorded for a larger member; neither is read."""

SCHEMA = pa.schema(
    [("key", pa.large_binary())]
    + [field for part in PARTS for field in ((f"{part}_at", pa.int64()), (f"{part}_size", pa.int32()))]
)
DAMAGE = b"damage"
"""Metadata key of the fault of a damaged shard, whose index ends with a row for the pairs that are lost."""


class ShardIndex:
    """The pairs of a shard, in the order in which the shard first names them; `damage` is its fault, if any."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self._keys = batch.column("key")
        self._at = [batch.column(f"{part}_at").to_numpy() for part in PARTS]
        self._sizes = [batch.column(f"{part}_size").to_numpy() for part in PARTS]
        damage = (batch.schema.metadata or {}).get(DAMAGE)
        self.damage: str | None = None if damage is None else damage.decode()

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, row: int) -> str:
        """The pair's key; bytes that are not UTF-8 are escaped."""
        return self._keys[row].as_py().decode(errors="backslashreplace")

    def part(self, row: int, name: str) -> tuple[int, int] | None:
        """Start and size in bytes of the "image", "text" or "json" of a pair; None where it is missing."""
        column = PARTS.index(name)
        at = int(self._at[column][row])
        return None if at < 0 else (at, int(self._sizes[column][row]))


def make_index(file: OpenFile, name: str, state: str) -> ShardIndex:
    """Scan a shard and keep its index in the cache, under its `state`."""
    batch = scan(file, name)
    with atomic_write(_place(state)) as partial, pa.ipc.new_file(str(partial), batch.schema) as writer:
        writer.write_batch(batch)
    return ShardIndex(batch)


def cached_index(state: str) -> ShardIndex | None:
    """The index built earlier, memory-mapped and so shared by all processes; None where there is none."""
    place = _place(state)
    with suppress(OSError, RuntimeError, ValueError, pa.ArrowException):
        # Torch's map, unlike NumPy's and Arrow's, holds no open file, of which there may be a thousand.
        mapped = torch.from_file(str(place), size=place.stat().st_size, dtype=torch.uint8).numpy()
        return ShardIndex(pa.ipc.open_file(pa.py_buffer(mapped)).get_batch(0))
    return None


def index_lock(state: str) -> AbstractContextManager[None]:
    """A lock for building an index, so that the ranks of a run don't all read the same shard."""
    return locked(f"index-{int(state[:8], 16) % LOCKS}")


def _place(state: str) -> Path:
    return cache_folder() / "shards" / "index" / f"{state}.arrow"


def scan(file: OpenFile, name: str) -> pa.RecordBatch:
    """Find the pairs of a shard.

    Members of one key are a pair wherever they stand. Of images with different extensions one is read, see `IMAGES`. A
    second image of the same extension, text or JSON of a key begins another pair. A name such as "IMG_1.2.jpg", whose
    key would be "IMG_1" and its extension "2.jpg", is a row without any part, so that it is counted.

    Returns:
        A row for each pair (see `SCHEMA`), -1 where a part is missing; one more for a damaged shard.

    Raises:
        UserError: The shard cannot be read, is compressed, or is damaged before the first pair.
    """
    rows = _GrowingIndex()
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
    rows.add(b"")
    return rows.to_arrow(SCHEMA.with_metadata({DAMAGE: damage.encode()}))


class _GrowingIndex:
    """The growing rows of an index, as flat arrays."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.latest: dict[bytes, int] = {}
        self.at = [array("q") for _ in PARTS]
        self.sizes = [array("i") for _ in PARTS]
        self.ranks = array("b")  # of each row's image, by `RANKS`
        self.dotted: dict[tuple[bytes, bytes], set[int]] = {}

    def __len__(self) -> int:
        return len(self.keys)

    def add_all(self, files: Iterable[Member]) -> None:
        for name, at, size in files:
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
                row = self.add(match[1])
            if kind == 0:
                self.ranks[row] = rank
            self.at[kind][row], self.sizes[kind][row] = at, min(size, LARGEST)

    def add_dotted(self) -> None:
        """Add images skipped for a dot in their key; one without a caption next to a pair's image, such as "1.seg.png",
        belongs to that pair."""
        for (key, stem), kinds in self.dotted.items():
            if 0 in kinds and (len(kinds) > 1 or key not in self.latest):
                self.add(stem)

    def add(self, key: bytes) -> int:
        self.latest[key] = row = len(self.keys)
        self.keys.append(key)
        self.ranks.append(0)
        for column in (*self.at, *self.sizes):
            column.append(-1)
        return row

    def to_arrow(self, schema: pa.Schema) -> pa.RecordBatch:
        columns = [pa.array(self.keys, pa.large_binary())]
        for at, sizes in zip(self.at, self.sizes, strict=True):
            columns += [pa.array(np.frombuffer(at, np.int64)), pa.array(np.frombuffer(sizes, np.int32))]
        return pa.record_batch(columns, schema=schema)
