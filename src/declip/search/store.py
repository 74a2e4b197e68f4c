"""The rows of an index: Arrow files that are mapped into memory, which rows are live, and their vectors."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from declip.data.pair import printable
from declip.data.sources.origin import Origin
from declip.errors import UserError
from declip.io.atomic import atomic_write
from declip.search.exact import VectorBlock
from declip.search.manifest import ELSEWHERE, Manifest, Over, PartEntry, read_manifest

VECTOR, CAPTION_VECTOR = "vector", "caption_vector"
DTYPES = {"float16": (pa.float16(), torch.float16), "float32": (pa.float32(), torch.float32)}

PART_ROWS = 8_192  # rows of a part: the most that is lost when `embed` is killed
CHECKED_BYTES = 2 << 30  # size up to which all checksums are checked, in about two seconds; beyond, only file sizes are

MOST_CAPTIONS, LONGEST_CAPTION = 16, 2_000  # captions of an image that are stored to be shown, and characters of one


class IndexedImage(NamedTuple):
    """A row of an index.

    Attributes:
        id: Stays the same as long as the index lives.
        key: The source's name of the image.
        place: Number of the image in the source when it was embedded.
    """

    id: int
    key: str
    captions: tuple[str, ...]
    place: int
    origin: Origin


class KnownImage(NamedTuple):
    """The columns by which a later call of `embed` recognizes an image; `stamp` is its `Origin.stamp`."""

    id: int
    key: str
    stamp: str


def schema_of(manifest: Manifest) -> pa.Schema:
    """The columns of a part."""
    vector = pa.list_(DTYPES[manifest.dtype][0], manifest.dimension)
    columns = {
        "id": pa.int64(),
        "place": pa.int64(),
        "key": pa.large_string(),
        "captions": pa.list_(pa.large_string()),
        "path": pa.large_string(),
        "offset": pa.int64(),
        "size": pa.int64(),
        "stamp": pa.large_string(),
        VECTOR: vector,
        **({CAPTION_VECTOR: vector} if manifest.captions else {}),
    }
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()])


def batch_of(
    manifest: Manifest, rows: Sequence[IndexedImage], vectors: Tensor, captions: Tensor | None
) -> pa.RecordBatch:
    """Put n rows together.

    Args:
        vectors: (n, d) float32, L2-normalized.
        captions: (n, d) float32, zeros for a row without captions; None where captions have no vectors.
    """
    schema = schema_of(manifest)
    texts = [[text[:LONGEST_CAPTION] for text in row.captions[:MOST_CAPTIONS]] for row in rows]
    cells = [
        (row.id, row.place, row.key, captions_of_row, *row.origin)
        for row, captions_of_row in zip(rows, texts, strict=True)
    ]
    columns = zip(*cells, strict=True)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=False)]
    for tensor in (vectors, captions):
        if tensor is not None:
            numbers = pa.array(tensor.to(DTYPES[manifest.dtype][1]).flatten().numpy())
            arrays.append(pa.FixedSizeListArray.from_arrays(numbers, manifest.dimension))
    return pa.record_batch(arrays, schema=schema)


def write_part(folder: Path, number: int, batch: pa.RecordBatch) -> PartEntry:
    """Write rows to a file, durably."""
    path = folder / f"part-{number:06d}.arrow"
    with atomic_write(path, ELSEWHERE, durable=True) as beside:
        with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        with beside.open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        size = beside.stat().st_size
    return PartEntry(file=path.name, rows=len(batch), bytes=size, sha256=digest)


class OpenPart:
    """A part, mapped into memory; no file stays open.

    Attributes:
        ids: (rows,) int64, rising.
        vectors: Images and captions → (rows, d) of the manifest's dtype; captions only where the index has them.

    Raises:
        UserError: It is missing or damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest, part: PartEntry, check: bool) -> None:
        path = folder / part.file
        try:
            if path.stat().st_size != part.bytes:
                raise ValueError(f"{path.stat().st_size:,} bytes instead of {part.bytes:,}")
            self._mapped = torch.from_file(str(path), size=part.bytes, dtype=torch.uint8)
            if check and hashlib.sha256(self._mapped.numpy().data).hexdigest() != part.sha256:
                raise ValueError("its checksum differs")
            self.batch = pa.ipc.open_file(pa.py_buffer(self._mapped.numpy())).get_batch(0)
            self.batch.validate(full=True)
            if self.batch.schema != schema_of(manifest) or len(self.batch) != part.rows:
                raise ValueError("it holds other rows than the manifest says")
        except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"The index's part '{path}' is damaged: {str(error).splitlines()[0]}. Restore a copy, or embed again "
                "into another folder."
            ) from error
        self.ids: np.ndarray = self.batch.column("id").to_numpy()
        self.vectors: dict[Over, Tensor] = {"images": self._numbers(VECTOR, manifest)}
        if manifest.captions:
            self.vectors["captions"] = self._numbers(CAPTION_VECTOR, manifest)

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, number: int) -> IndexedImage:
        """A row by its number in this part."""
        id, place, key, captions, *origin = (self.batch.column(column)[number].as_py() for column in range(8))
        return IndexedImage(id, key, tuple(captions), place, Origin(*origin))

    def _numbers(self, name: str, manifest: Manifest) -> Tensor:
        """A column of vectors as a view of the mapped memory: pyarrow would copy float16."""
        values = self.batch.column(name).flatten()
        kind = DTYPES[manifest.dtype][1]
        start = values.buffers()[1].address + values.offset * kind.itemsize - self._mapped.data_ptr()
        numbers = self._mapped[start : start + len(values) * kind.itemsize].view(kind)
        return numbers.view(len(self), manifest.dimension)


class Store:
    """All rows of an index. A position is the number of a row over all parts.

    Args:
        check: Whether to check the parts' checksums; None does up to `CHECKED_BYTES`.

    Attributes:
        ids: (rows,) int64, rising.
        dead: (rows,) bool, the rows that no search finds.

    Raises:
        UserError: There is no index, or it is damaged.
    """

    def __init__(self, folder: Path, check: bool | None = None) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        if check is None:
            check = sum(part.bytes for part in self.manifest.parts) <= CHECKED_BYTES
        self.parts = [OpenPart(folder, self.manifest, part, check) for part in self.manifest.parts]
        self.ids = np.concatenate([np.empty(0, np.int64), *(part.ids for part in self.parts)])
        self._starts = np.cumsum([0, *(len(part) for part in self.parts)])
        if (np.diff(self.ids) <= 0).any() or (self.ids >= self.manifest.next_id).any():
            raise UserError(f"The index '{folder}' is damaged: its parts do not follow each other. Restore a copy.")
        self.dead = np.isin(self.ids, np.array([*self.manifest.removed, *self.manifest.gone], np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def live(self) -> np.ndarray:
        """(n,) int64, positions of the rows that a search finds."""
        return np.flatnonzero(~self.dead)

    def blocks(self, over: Over = "images", first: int = 0) -> list[VectorBlock]:
        """The vectors of the rows with the id `first` or more, for exact search."""
        blocks = []
        for part, start in zip(self.parts, self._starts, strict=False):
            skipped = int(np.searchsorted(part.ids, first))
            if skipped == len(part):
                continue
            vectors = self._vectors(part, over)[skipped:]
            dead = torch.from_numpy(self.dead[start + skipped : start + len(part)])
            if over == "captions":  # zeros stand for "no captions", which no search may find
                dead = dead | ~vectors.any(1)
            ids = torch.from_numpy(np.array(part.ids[skipped:]))
            blocks.append(VectorBlock(ids, vectors, dead if bool(dead.any()) else None))
        return blocks

    def positions(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) int64, the positions of live rows; raises `UserError` where an id does not exist or is hidden."""
        wanted = np.asarray(ids, np.int64)
        positions = np.searchsorted(self.ids, wanted).clip(0, max(0, len(self) - 1))
        for id, position in zip(wanted.tolist(), positions.tolist(), strict=True):
            if not len(self) or self.ids[position] != id or self.dead[position]:
                raise UserError(f"The index '{self.folder}' has no image with the id {id}.")
        return positions

    def vectors(self, positions: np.ndarray, over: Over = "images") -> Tensor:
        """(n, d) float32."""
        vectors = torch.empty(len(positions), self.manifest.dimension)
        owners = np.searchsorted(self._starts, positions, "right") - 1
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            rows = torch.from_numpy(positions[mine] - self._starts[number])
            vectors[torch.from_numpy(mine)] = self._vectors(self.parts[number], over)[rows].float()
        return vectors

    def row(self, position: int) -> IndexedImage:
        """The row at a position."""
        number = int(np.searchsorted(self._starts, position, "right")) - 1
        return self.parts[number].row(int(position - self._starts[number]))

    def column(self, name: str) -> list:
        """The values of a column for all rows, hidden ones included."""
        return [value for part in self.parts for value in part.batch.column(name).to_pylist()]

    def known(self, before: int) -> Iterator[KnownImage]:
        """The rows with an id below `before`."""
        columns = zip(self.ids.tolist(), self.column("key"), self.column("stamp"), strict=True)
        return (KnownImage(*row) for row in columns if row[0] < before)

    def ids_of(self, keys: Sequence[str]) -> set[int]:
        """Ids of all rows with these keys, hidden ones too; raises `UserError` where no row has one of them."""
        wanted = set(keys)
        rows = [(id, key) for id, key in zip(self.ids.tolist(), self.column("key"), strict=True) if key in wanted]
        if missing := sorted(wanted - {key for _, key in rows}):
            more = f", and {len(missing) - 1} more are not" if len(missing) > 1 else ""
            raise UserError(
                f"'{printable(missing[0])}' is not in the index '{self.folder}'{more}. Keys are what search shows: "
                "paths below the source, for most sources."
            )
        return {id for id, _ in rows}

    def live_batches(self) -> Iterator[pa.RecordBatch]:
        """The live rows, `PART_ROWS` at a time."""
        pending: list[pa.RecordBatch] = []
        for part, start in zip(self.parts, self._starts, strict=False):
            pending.append(part.batch.filter(pa.array(~self.dead[start : start + len(part)])))
            while sum(map(len, pending)) >= PART_ROWS:
                merged = pa.concat_batches(pending)
                yield merged[:PART_ROWS]
                pending = [merged[PART_ROWS:]]
        if any(map(len, pending)):
            yield pa.concat_batches(pending)

    def _vectors(self, part: OpenPart, over: Over) -> Tensor:
        if over not in part.vectors:
            raise UserError(
                f"The index '{self.folder}' has no vectors of captions. Embed with --captions, into another folder."
            )
        return part.vectors[over]
