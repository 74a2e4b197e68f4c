"""The rows and vectors of an index: a Parquet table and .npy matrices in one folder, mapped into memory."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from declip.data.pair import Origin
from declip.data.sources.stored_paths import resolve
from declip.errors import UserError, unknown
from declip.io.atomic import ELSEWHERE, atomic_write, flush
from declip.search.exact import VectorBlock
from declip.search.info import IndexInfo, Over

ROWS = "rows.parquet"
MATRICES: dict[Over, str] = {"images": "vectors.npy", "captions": "caption_vectors.npy"}

PART_ROWS = 8_192  # rows of a part of an unfinished index, of a row group, and of a block of vectors to search
MOST_CAPTIONS, LONGEST_CAPTION = 16, 2_000  # captions of an image that are stored to be shown, and characters of one
CACHED_GROUPS = 8  # row groups that stay decoded, about 2 MB each

_COLUMNS = {
    "id": pa.int64(),
    "place": pa.int64(),
    "key": pa.large_string(),
    "captions": pa.list_(pa.field("element", pa.large_string(), nullable=False)),
    "path": pa.large_string(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "stamp": pa.large_string(),
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()])


@dataclass(frozen=True)
class IndexedImage:
    """A row of an index."""

    id: int  # for `Index.image`, `neighbors` and `vectors`; stays the same in later updates
    key: str  # the source's name of the image
    captions: tuple[str, ...]
    place: int  # number of the image in the source when it was embedded
    origin: Origin  # its file or shard, with offset and size in bytes

    @property
    def caption(self) -> str:
        """The first caption; empty if there is none."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True)
class Block:
    """Rows in memory with their vectors."""

    table: pa.Table  # with the columns of `SCHEMA`
    matrices: dict[Over, np.ndarray]  # (n, d) each; rows of zeros in "captions" are images without captions

    @classmethod
    def of(cls, rows: Sequence[IndexedImage], images: Tensor, captions: Tensor | None, dtype: str) -> "Block":
        """Convert rows and their vectors (n, d) float32 to the types that are stored."""
        texts = [[text[:LONGEST_CAPTION] for text in row.captions[:MOST_CAPTIONS]] for row in rows]
        cells = [(row.id, row.place, row.key, shown, *row.origin) for row, shown in zip(rows, texts, strict=True)]
        columns = list(zip(*cells, strict=True))
        arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
        matrices: dict[Over, np.ndarray] = {"images": images.numpy().astype(dtype)}
        if captions is not None:
            matrices["captions"] = captions.numpy().astype(dtype)
        return cls(pa.table(arrays, schema=SCHEMA), matrices)


def write_blocks(target: Path, blocks: Iterable[Block], count: int) -> None:
    """Write `count` rows into the new folder `target`, which appears when all of its files are on the disk.

    Values are stored as they are, without compression or dictionaries, so that a file's size limits what reading it
    takes; see `Store`.
    """
    with atomic_write(target, ELSEWHERE, durable=True) as folder:
        folder.mkdir()
        matrices: dict[Over, np.memmap] = {}
        start = 0
        waiting: list[pa.Table] = []  # so that many small updates do not leave as many small row groups
        with pq.ParquetWriter(folder / ROWS, SCHEMA, compression="NONE", use_dictionary=False) as writer:
            for block in blocks:
                stop = start + len(block.table)
                waiting.append(block.table)
                if stop == count or sum(map(len, waiting)) >= PART_ROWS:
                    writer.write_table(pa.concat_tables(waiting), row_group_size=PART_ROWS)
                    waiting.clear()
                for over, values in block.matrices.items():
                    if over not in matrices:
                        shape = (count, values.shape[1])
                        path = folder / MATRICES[over]
                        matrices[over] = np.lib.format.open_memmap(path, "w+", values.dtype, shape)
                    matrices[over][start:stop] = values
                start = stop
        for matrix in matrices.values():
            matrix.flush()
        for path in folder.iterdir():
            flush(path)


class Store:
    """The rows and vectors in a folder that `write_blocks` wrote. A position is the number of a row.

    Only the ids are read when it is opened. The vectors stay mapped from the disk, and rows are decoded by groups of
    `PART_ROWS`. The files may be replaced while they are open.

    Args:
        index: The folder of the index, which stored paths are relative to.

    Raises:
        UserError: A file is damaged, or differs from `info`.
        FileNotFoundError: A file is missing.
    """

    def __init__(self, folder: Path, index: Path, info: IndexInfo) -> None:
        self.folder, self.index = folder, index
        try:
            self._buffer = pa.memory_map(str(folder / ROWS)).read_buffer()
            file = pq.ParquetFile(pa.BufferReader(self._buffer))
            _check_layout(file)
            self._metadata = file.metadata
            kinds: list[Over] = ["images", "captions"] if info.captions else ["images"]
            # Mode "c" (copy on write) because torch warns about arrays that are not writable.
            self.matrices = {over: np.load(folder / MATRICES[over], mmap_mode="c") for over in kinds}
            for over, matrix in self.matrices.items():
                expected = ((self._metadata.num_rows, info.dimension), np.dtype(info.dtype))
                if (matrix.shape, matrix.dtype) != expected:
                    raise ValueError(f"{MATRICES[over]} has shape {matrix.shape} and type {matrix.dtype}")
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            raise self._damaged(error) from error
        # Not `to_numpy`, which imports pandas; `concatenate` makes the writable copy that torch asks for.
        pieces = [np.from_dlpack(chunk) for chunk in self.column("id").chunks]
        self.ids: np.ndarray = np.concatenate([np.zeros(0, np.int64), *pieces])
        if (np.diff(self.ids) <= 0).any() or (self.ids >= info.next_id).any():
            raise self._damaged("the ids do not increase")
        sizes = [self._metadata.row_group(number).num_rows for number in range(self._metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._group = lru_cache(CACHED_GROUPS)(lambda number: self._read(groups=[number]))

    def column(self, name: str) -> pa.ChunkedArray:
        """Read a column of all rows."""
        return self._read(columns=[name])[name]

    def positions(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) int64, the positions of rows; raises `UserError` for an id that does not exist."""
        wanted = np.atleast_1d(np.asarray(ids, np.int64))
        positions = np.searchsorted(self.ids, wanted)
        known = positions < len(self.ids)
        known[known] = self.ids[positions[known]] == wanted[known]
        if not known.all():
            raise UserError(f"The index '{self.index}' has no image with the id {wanted[~known][0]}.")
        return positions

    def row(self, position: int) -> IndexedImage:
        """Read the row at a position."""
        number = int(np.searchsorted(self._starts, position, "right")) - 1
        cells = self._group(number).slice(position - self._starts[number], 1).columns
        id, place, key, captions, path, *origin = (column[0].as_py() for column in cells)
        return IndexedImage(id, key, tuple(captions), place, Origin(resolve(path, self.index), *origin))

    def matrix(self, over: Over = "images") -> np.ndarray:
        """(n, d), all vectors of a kind, mapped from the disk."""
        if over not in MATRICES:
            raise unknown("place to search", over, MATRICES)
        if over not in self.matrices:
            raise UserError(
                f"The index '{self.index}' has no vectors of captions. Embed with --captions, into another folder."
            )
        return self.matrices[over]

    def search_blocks(self, over: Over = "images") -> list[VectorBlock]:
        """All vectors for exact search; vectors of zeros, which stand for images without captions, are hidden."""
        ids, vectors = torch.from_numpy(self.ids), torch.from_numpy(self.matrix(over))
        pieces = zip(ids.split(PART_ROWS), vectors.split(PART_ROWS), strict=True)
        return [VectorBlock(own, piece, ~piece.any(1) if over == "captions" else None) for own, piece in pieces]

    def blocks(self, kept: np.ndarray | None = None) -> Iterator[Block]:
        """The rows group by group; `kept` (n,) bool selects some of them."""
        for number, (start, stop) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            table, own = self._read(groups=[number]), slice(start, stop)
            if kept is None or kept[own].all():
                yield Block(table, {over: matrix[own] for over, matrix in self.matrices.items()})
            elif kept[own].any():
                mask = kept[own]
                yield Block(table.filter(pa.array(mask)), {over: m[own][mask] for over, m in self.matrices.items()})

    def _read(self, groups: list[int] | None = None, columns: list[str] | None = None) -> pa.Table:
        try:  # A reader of its own for each call: one cannot be shared by threads.
            file = pq.ParquetFile(pa.BufferReader(self._buffer), metadata=self._metadata)
            everything = list(range(self._metadata.num_row_groups))
            table = file.read_row_groups(everything if groups is None else groups, columns, use_threads=False)
            table.validate(full=True)
            return table
        except (OSError, ValueError, pa.ArrowException) as error:
            raise self._damaged(error) from error

    def _damaged(self, problem: object) -> UserError:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        return UserError(
            f"The files of the index in '{self.folder}' are damaged: {reason}. Restore a copy, or embed again into "
            "another folder."
        )


def _check_layout(file: pq.ParquetFile) -> None:
    """Raise a `ValueError` unless the table is as `write_blocks` writes it.

    Compression and dictionaries would let a small file from a stranger expand to any size.
    """
    if not file.schema_arrow.equals(SCHEMA):
        raise ValueError(f"{ROWS} has other columns")
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        chunks = [group.column(place) for place in range(group.num_columns)]
        plain = all(
            chunk.compression == "UNCOMPRESSED"
            and set(chunk.encodings) <= {"PLAIN", "RLE"}
            and chunk.num_values <= MOST_CAPTIONS * group.num_rows
            for chunk in chunks
        )
        if not plain or group.num_rows > PART_ROWS:
            raise ValueError(f"{ROWS} was not written by declip")
