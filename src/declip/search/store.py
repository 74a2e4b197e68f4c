"""The rows of an index: Arrow files that are mapped into memory, and their vectors."""

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from declip.data.pair import Origin
from declip.errors import UserError, unknown
from declip.io.atomic import atomic_write, sha256
from declip.search.exact import VectorBlock
from declip.search.manifest import ELSEWHERE, Manifest, Over, PartEntry, read_manifest

COLUMNS: dict[Over, str] = {"images": "vector", "captions": "caption_vector"}
DTYPES = {"float16": (pa.float16(), torch.float16), "float32": (pa.float32(), torch.float32)}

PART_ROWS = 8_192  # rows of a part: the most that is lost when `embed` is killed
MOST_CAPTIONS, LONGEST_CAPTION = 16, 2_000  # captions of an image that are stored to be shown, and characters of one


@dataclass(frozen=True)
class IndexedImage:
    """A row of an index."""

    id: int  # for `Index.image`, `neighbors` and `vectors`; stays the same as long as the index lives
    key: str  # the source's name of the image
    captions: tuple[str, ...]
    place: int  # number of the image in the source when it was embedded
    origin: Origin  # its file or shard, with offset and size in bytes

    @property
    def caption(self) -> str:
        """The first caption, empty where there is none."""
        return self.captions[0] if self.captions else ""


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
        COLUMNS["images"]: vector,
        **({COLUMNS["captions"]: vector} if manifest.captions else {}),
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
    cells = [(row.id, row.place, row.key, shown, *row.origin) for row, shown in zip(rows, texts, strict=True)]
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
    with atomic_write(path, ELSEWHERE, durable=True) as temporary:
        with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        return PartEntry(file=path.name, rows=len(batch), bytes=temporary.stat().st_size, sha256=sha256(temporary))


def open_part(folder: Path, manifest: Manifest, part: PartEntry, check: bool = True) -> pa.RecordBatch:
    """Map a part into memory; no file stays open. Raises `UserError` where it is missing or damaged."""
    path = folder / part.file
    try:
        if path.stat().st_size != part.bytes:
            raise ValueError(f"{path.stat().st_size:,} bytes instead of {part.bytes:,}")
        mapped = torch.from_file(str(path), size=part.bytes, dtype=torch.uint8).numpy()
        if check and hashlib.sha256(mapped.data).hexdigest() != part.sha256:
            raise ValueError("its checksum differs")
        batch = pa.ipc.open_file(pa.py_buffer(mapped)).get_batch(0)
        batch.validate(full=True)
        if batch.schema != schema_of(manifest) or len(batch) != part.rows:
            raise ValueError("it holds other rows than the manifest says")
        return batch
    except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
        raise UserError(
            f"The index's part '{path}' is damaged: {str(error).splitlines()[0]}. Restore a copy, or embed again into "
            "another folder."
        ) from error


class Store:
    """All rows of an index: `table` and `ids`, which rise. A position is the number of a row over all parts.

    Args:
        check: Whether to check the parts' checksums, which takes about a second for 2 GB.
    """

    def __init__(self, folder: Path, check: bool = True) -> None:
        self.folder, self.manifest = folder, read_manifest(folder)
        batches = [open_part(folder, self.manifest, part, check) for part in self.manifest.parts]
        self.table = pa.Table.from_batches(batches, schema_of(self.manifest))
        self.ids: np.ndarray = self.table["id"].to_numpy().copy()  # torch takes no array that cannot be written
        if (np.diff(self.ids) <= 0).any() or (self.ids >= self.manifest.next_id).any():
            raise UserError(f"The index '{folder}' is damaged: its parts do not follow each other. Restore a copy.")
        self._starts = np.cumsum([0, *map(len, batches)])

    def blocks(self, over: Over = "images") -> list[VectorBlock]:
        """All vectors, part by part, for exact search; zeros stand for "no captions", which no search may find."""
        parts = self._vectors(over)
        ids = torch.from_numpy(self.ids).split([len(vectors) for vectors in parts])
        hidden = [~vectors.any(1) if over == "captions" else None for vectors in parts]
        return list(map(VectorBlock, ids, parts, hidden))

    def positions(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) int64, the positions of rows; raises `UserError` where an id does not exist."""
        wanted = np.atleast_1d(np.asarray(ids, np.int64))
        positions = np.searchsorted(self.ids, wanted)
        known = positions < len(self.ids)
        known[known] = self.ids[positions[known]] == wanted[known]
        if not known.all():
            raise UserError(f"The index '{self.folder}' has no image with the id {wanted[~known][0]}.")
        return positions

    def vectors(self, positions: np.ndarray, over: Over = "images") -> Tensor:
        """(n, d) float32."""
        vectors = torch.empty(len(positions), self.manifest.dimension)
        owners = np.searchsorted(self._starts, positions, "right") - 1
        parts = self._vectors(over)
        for number in np.unique(owners):
            mine = np.flatnonzero(owners == number)
            rows = torch.from_numpy(positions[mine] - self._starts[number])
            vectors[torch.from_numpy(mine)] = parts[number][rows].float()
        return vectors

    def row(self, position: int) -> IndexedImage:
        """The row at a position."""
        cells = self.table.slice(position, 1).select(list(range(8)))  # all but the vectors
        id, place, key, captions, *origin = (column[0].as_py() for column in cells.columns)
        return IndexedImage(id, key, tuple(captions), place, Origin(*origin))

    def drop(self, ids: Collection[int]) -> None:
        """Write the parts that hold some of these rows again without them; it counts once the manifest is saved."""
        manifest, parts = self.manifest, []
        number = manifest.next_part
        for part, start in zip(manifest.parts, self._starts, strict=False):
            kept = ~np.isin(self.ids[start : start + part.rows], list(ids))
            if kept.all():
                parts.append(part)
            elif kept.any():
                batch = open_part(self.folder, manifest, part)  # checked, so that no damage gets a new checksum
                parts.append(write_part(self.folder, number, batch.filter(pa.array(kept))))
                number += 1
        manifest.parts = parts

    def _vectors(self, over: Over) -> list[Tensor]:
        """Each part's vectors, (rows, d) of the manifest's dtype, in the mapped memory."""
        if over not in COLUMNS:
            raise unknown("place to search", over, COLUMNS)
        if COLUMNS[over] not in self.table.column_names:
            raise UserError(
                f"The index '{self.folder}' has no vectors of captions. Embed with --captions, into another folder."
            )
        chunks = self.table[COLUMNS[over]].chunks
        return [torch.from_dlpack(chunk.flatten()).view(-1, self.manifest.dimension) for chunk in chunks]
