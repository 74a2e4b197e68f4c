"""The files of an index: index.json, a Parquet table of rows and .npy matrices of vectors."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from declip.data.pair import Origin
from declip.data.sources.names import resolve
from declip.errors import UserError, unknown
from declip.io.text import one_line
from declip.search.info import IndexInfo, Over

ROWS = "rows.parquet"
MATRICES: dict[Over, str] = {"images": "vectors.npy", "captions": "caption_vectors.npy"}

GROUP_ROWS = 8_192  # most rows of a row group
MOST_CAPTIONS = 16  # captions of an image that are stored to be shown
LONGEST_CAPTION = 2_000  # characters of one
CACHED_GROUPS = 8  # row groups that stay decoded, about 2 MB each

_COLUMNS = {
    "index": pa.int64(),
    "key": pa.large_string(),
    "captions": pa.list_(pa.field("element", pa.large_string(), nullable=False)),
    "path": pa.large_string(),
    "offset": pa.int64(),
    "size": pa.int64(),
}
_FIELDS = [pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()]
SCHEMA = pa.schema(_FIELDS)


@dataclass(frozen=True)
class IndexedImage:
    """A row of an index."""

    id: int  # its number in the index
    key: str  # the source's name of the image
    captions: tuple[str, ...]
    index: int  # the image's index in its source when it was embedded
    origin: Origin  # its file or shard, with offset and size in bytes

    @property
    def caption(self) -> str:
        """The first caption; empty if there is none."""
        if self.captions:
            return self.captions[0]
        return ""


@dataclass(frozen=True)
class Block:
    """Rows in memory with their vectors."""

    table: pa.Table  # with the columns of `SCHEMA`
    matrices: dict[Over, np.ndarray]  # (n, d) each; zeros in "captions": an image without captions

    @classmethod
    def of(
        cls, rows: Sequence[IndexedImage], images: Tensor, captions: Tensor | None, dtype: str
    ) -> "Block":
        """Convert rows and their vectors (n, d) float32 to the types that are stored."""
        cells = []
        for row in rows:
            texts = [text[:LONGEST_CAPTION] for text in row.captions[:MOST_CAPTIONS]]
            cells.append((row.index, row.key, texts, *row.origin[:3]))
        matrices: dict[Over, np.ndarray] = {"images": images.numpy().astype(dtype)}
        if captions is not None:
            matrices["captions"] = captions.numpy().astype(dtype)
        columns = list(zip(*cells, strict=True))
        return cls(pa.table(columns, schema=SCHEMA), matrices)


class Store:
    """The rows and vectors of an index. Damage is a `UserError`, a missing file FileNotFoundError."""

    # The vectors stay mapped from the disk, and rows are decoded by groups.
    def __init__(self, folder: Path, info: IndexInfo) -> None:
        self.folder = folder
        self._lock = Lock()
        self.matrices: dict[Over, np.ndarray] = {}
        with self._reading():
            self._file = pq.ParquetFile(folder / ROWS, memory_map=True)
            sizes = _check_layout(self._file)
            for over, name in MATRICES.items():
                if over == "captions" and not info.captions:
                    continue
                # Mode "c" (copy on write) because torch warns about arrays that are not writable.
                matrix = np.load(folder / name, mmap_mode="c")
                expected = (sum(sizes), info.dimension), np.dtype(info.dtype)
                if (matrix.shape, matrix.dtype) != expected:
                    raise ValueError(f"{name} has shape {matrix.shape} and type {matrix.dtype}")
                self.matrices[over] = matrix
        self._starts = np.cumsum([0, *sizes])
        names = sorted([ROWS, *(MATRICES[over] for over in self.matrices)])
        self.files = {folder / name: (folder / name).stat().st_size for name in names}

    def __len__(self) -> int:
        """Number of rows."""
        return int(self._starts[-1])

    def column(self, name: str) -> pa.ChunkedArray:
        """Read a column of all rows."""
        with self._reading():
            column = self._file.read([name], use_threads=False)[name]
            column.validate(full=True)
            return column

    def check(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) int64, the ids; raises `UserError` for one that does not exist."""
        wanted = np.atleast_1d(np.asarray(ids, np.int64))
        known = (wanted >= 0) & (wanted < len(self))
        if not known.all():
            raise UserError(
                f"The index '{self.folder}' has no image with the id {wanted[~known][0]}."
            )
        return wanted

    def rows(self, ids: np.ndarray) -> list[IndexedImage]:
        """Read rows."""
        rows = []
        cells = self._cells(ids, SCHEMA.names)
        for id, own in zip(ids.tolist(), cells, strict=True):
            index, key, captions, path, offset, size = own
            origin = Origin(resolve(path, self.folder), offset, size)
            rows.append(IndexedImage(id, key, tuple(captions), index, origin))
        return rows

    def keys(self, ids: np.ndarray) -> list[str]:
        """Read the keys of rows."""
        return [key for (key,) in self._cells(ids, ["key"])]

    def _cells(self, ids: np.ndarray, names: list[str]) -> list[list[Any]]:
        """The cells of some columns of rows; each group of rows is decoded once."""
        groups = np.searchsorted(self._starts, ids, "right") - 1
        cells = dict[int, list[Any]]()
        for number in np.unique(groups).tolist():
            columns = self._group(number).select(names).columns
            for position in np.flatnonzero(groups == number).tolist():
                row = int(ids[position] - self._starts[number])
                cells[position] = [column[row].as_py() for column in columns]
        return [cells[position] for position in range(len(ids))]

    def matrix(self, over: Over = "images") -> np.ndarray:
        """(n, d), all vectors of a kind, mapped from the disk."""
        if over not in MATRICES:
            raise unknown("kind of vectors", over, MATRICES)
        if over not in self.matrices:
            raise UserError(
                f"The index '{self.folder}' has no vectors of captions. Embed again with --captions."
            )
        return self.matrices[over]

    @cached_property
    def _group(self) -> Callable[[int], pa.Table]:
        # Made at its first use: it refers to this object, whose files would stay open until
        # Python looks for cycles.
        return lru_cache(CACHED_GROUPS)(self._read_group)

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
            raise UserError(
                f"The files of the index in '{self.folder}' are damaged: {one_line(error)}. Embed "
                "again into another folder."
            ) from error


def open_index(folder: Path) -> tuple[IndexInfo, Store]:
    """Open an index, also while another process replaces it."""
    while True:
        info = IndexInfo.read(folder)
        problem: Exception | None = None
        try:
            store = Store(folder, info)
        except (FileNotFoundError, UserError) as error:
            problem = error
        if IndexInfo.read(folder) != info:  # the files are of two indices
            continue
        if isinstance(problem, FileNotFoundError):
            raise UserError(
                f"A file of the index '{folder}' is missing ({problem}). Embed again into another folder."
            ) from problem
        if problem is not None:
            raise problem
        return info, store


def _check_layout(file: pq.ParquetFile) -> list[int]:
    """The rows of each group; raises `ValueError` unless the table is as declip writes it.

    Without compression and dictionaries a file's size limits the memory that reading it takes.
    """
    sizes = []
    plain = file.schema_arrow.equals(SCHEMA)
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        sizes.append(group.num_rows)
        plain &= group.num_rows <= GROUP_ROWS
        for column in range(group.num_columns):
            chunk = group.column(column)
            plain &= chunk.compression == "UNCOMPRESSED"
            plain &= set(chunk.encodings) <= {"PLAIN", "RLE"}
            plain &= chunk.num_values <= MOST_CAPTIONS * group.num_rows
    if not plain:
        raise ValueError(f"{ROWS} was not written by declip")
    return sizes
