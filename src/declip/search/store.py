"""The rows and vectors of an index: a Parquet table and .npy matrices in one folder, mapped into memory."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from declip.data.pair import Origin
from declip.data.sources.shard_files import resolve
from declip.errors import UserError, unknown
from declip.io.atomic import ELSEWHERE, atomic_write, flush
from declip.search.info import IndexInfo, Over

ROWS = "rows.parquet"
MATRICES: dict[Over, str] = {"images": "vectors.npy", "captions": "caption_vectors.npy"}

PART_ROWS = 8_192  # most rows of a part of an unfinished index, and of a row group
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

    id: int  # for `Index.image` and `Index.vectors`; stays the same in later updates
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
        given: dict[Over, Tensor | None] = {"images": images, "captions": captions}
        matrices = {over: vectors.numpy().astype(dtype) for over, vectors in given.items() if vectors is not None}
        return cls(pa.table(arrays, schema=SCHEMA), matrices)


def hash64(value: object) -> int:
    """64 bits that stand for a key, or for a key with stamp and place."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode("utf-8", "replace"), digest_size=8).digest(), "little")


def write_blocks(target: Path, blocks: Iterable[Block], count: int) -> None:
    """Write `count` rows into the new folder `target`, which appears when all of its files are on the disk."""
    with atomic_write(target, ELSEWHERE, durable=True) as folder:
        folder.mkdir()
        matrices: dict[Over, np.memmap] = {}
        start = 0
        # Without compression and dictionaries, so that a file's size limits what reading it takes: `_check_layout`.
        with pq.ParquetWriter(folder / ROWS, SCHEMA, compression="NONE", use_dictionary=False) as writer:
            for block in blocks:
                writer.write_table(block.table, row_group_size=PART_ROWS)
                stop = start + len(block.table)
                for over, values in block.matrices.items():
                    if over not in matrices:
                        path, shape = folder / MATRICES[over], (count, values.shape[1])
                        matrices[over] = np.lib.format.open_memmap(path, "w+", values.dtype, shape)
                    matrices[over][start:stop] = values
                start = stop
        for matrix in matrices.values():
            matrix.flush()
        for path in folder.iterdir():
            flush(path)


class Store:
    """The rows and vectors in a folder that `write_blocks` wrote. A position is the number of a row.

    Stored paths are relative to the folder of the index. A damaged file is a `UserError`, a missing one
    FileNotFoundError.
    """

    # Only the ids are read here. The vectors stay mapped from the disk, and rows are decoded by groups. The files may
    # be replaced while they are open.
    def __init__(self, folder: Path, index: Path, info: IndexInfo) -> None:
        self.folder, self.index, self._lock = folder, index, Lock()
        kinds: list[Over] = ["images", "captions"] if info.captions else ["images"]
        with self._reading():
            self._file = pq.ParquetFile(folder / ROWS, memory_map=True)
            _check_layout(self._file)
            # Mode "c" (copy on write) because torch warns about arrays that are not writable.
            self.matrices = {over: np.load(folder / MATRICES[over], mmap_mode="c") for over in kinds}
            for over, matrix in self.matrices.items():
                expected = ((self._file.metadata.num_rows, info.dimension), np.dtype(info.dtype))
                if (matrix.shape, matrix.dtype) != expected:
                    raise ValueError(f"{MATRICES[over]} has shape {matrix.shape} and type {matrix.dtype}")
        # Not `to_numpy`, which imports pandas; `concatenate` makes the writable copy that torch asks for.
        pieces = [np.from_dlpack(chunk) for chunk in self.column("id").chunks]
        self.ids: np.ndarray = np.concatenate([np.zeros(0, np.int64), *pieces])
        with self._reading():
            if (np.diff(self.ids) <= 0).any() or (self.ids >= info.next_id).any():
                raise ValueError("the ids do not increase")
        groups = range(self._file.num_row_groups)
        self._starts = np.cumsum([0, *(self._file.metadata.row_group(number).num_rows for number in groups)])
        self._group = lru_cache(CACHED_GROUPS)(self._read_group)

    def column(self, name: str) -> pa.ChunkedArray:
        """Read a column of all rows."""
        with self._reading():
            column = self._file.read([name], use_threads=False)[name]
            column.validate(full=True)
            return column

    def tables(self, *names: str) -> Iterator[pa.Table]:
        """Read columns of all rows, group by group."""
        for number in range(self._file.num_row_groups):
            with self._reading():
                table = self._file.read_row_group(number, list(names), use_threads=False)
                table.validate(full=True)
            yield table

    def positions(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) int64, the positions of rows; raises `UserError` for an id that does not exist."""
        wanted = np.atleast_1d(np.asarray(ids, np.int64))
        if not (known := np.isin(wanted, self.ids)).all():
            raise UserError(f"The index '{self.index}' has no image with the id {wanted[~known][0]}.")
        return np.searchsorted(self.ids, wanted)

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
            raise UserError(f"The index '{self.index}' has no vectors of captions. Embed again with --captions.")
        return self.matrices[over]

    def blocks(self, kept: np.ndarray) -> Iterator[Block]:
        """The rows that `kept` (n,) bool selects, group by group."""
        for number, (start, stop) in enumerate(zip(self._starts, self._starts[1:], strict=False)):
            if (mask := kept[start:stop]).any():
                table = self._read_group(number).filter(pa.array(mask))
                yield Block(table, {over: matrix[start:stop][mask] for over, matrix in self.matrices.items()})

    def _read_group(self, number: int) -> pa.Table:
        with self._reading():
            table = self._file.read_row_group(number, use_threads=False)
            table.validate(full=True)
            return table

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One thread at a time, with damage as a `UserError`."""
        try:
            with self._lock:
                yield
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"The files of the index in '{self.folder}' are damaged: {reason}. Embed again into another folder."
            ) from error


def _check_layout(file: pq.ParquetFile) -> None:
    """Raise a `ValueError` unless the table is as `write_blocks` writes it."""
    if not file.schema_arrow.equals(SCHEMA):
        raise ValueError(f"{ROWS} has other columns")
    for number in range(file.num_row_groups):
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
