"""Rows of tables as pairs: memory-mapped if the table is large, never Python objects."""

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from declip.data.pair import BrokenPair
from declip.data.sources.shard_files import expand, files_in
from declip.data.sources.subset import COLUMN, places_by_split, split_numbers
from declip.errors import UserError
from declip.io.cache import cached_table

# Bytes of a file (decompressed), and rows of a Parquet file, beyond which what is read is kept in a cache file.
LARGE_TABLE, MANY_ROWS = 32 << 20, 250_000

# Bytes that the columns of a Parquet file may take, and their largest ratio to the file's size beyond that.
MOST_IN_PARQUET, MOST_GROWTH = 1 << 30, 100

# Rows of a Parquet file read at a time: they may hold images, or a value that is stored once and repeated in all.
ROWS_AT_ONCE = 512

# Splits that begin the names of Parquet files, as the Hub has them: `train-00000-of-00002.parquet`.
SPLIT = re.compile("(train|val|dev|test)(?![a-z])|validation", re.IGNORECASE)


def by_lower_name(columns: Sequence[str]) -> dict[str, str]:
    """Columns by their names without case; the first of several."""
    return {name.strip().lower(): name for name in reversed(columns)}


@dataclass(frozen=True)
class TableRow:
    """A pair of a table, whose cells may be of any type."""

    key: str  # the image's path, else the number of its row or line
    image_cell: Any
    values: list[Any]  # the caption's cell in each row of the image
    group_cell: Any = None  # of the first row


def group_number(cell: Any) -> int:
    """A hash of a group's cell, 63 bits; 0 where the cell is empty."""
    if cell is None or (isinstance(cell, float) and cell != cell) or not (name := str(cell).strip()):
        return 0  # pandas writes NaN for an empty cell
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1 | 1


def decoded(cell: pa.Scalar, key: str) -> Any:
    """The value of a cell; raises `BrokenPair`."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise not_utf8(key, error) from error


def not_utf8(key: str, error: UnicodeDecodeError) -> BrokenPair:
    hint = "if the file is Latin-1, convert it: iconv -f latin1 -t utf-8"
    return BrokenPair("invalid text", key, f"not UTF-8: {error}; {hint}")


class TableRows(ABC):
    """The rows of a table as pairs: rows of the same image are one, in the order of their first row."""

    columns: Sequence[str]  # of the file
    table: pa.Table  # what is held of each row, the image first

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent  # the folder that image paths are relative to
        self.files = [path]
        self.large = path.is_file() and path.stat().st_size > LARGE_TABLE  # what is read goes to a cache file

    def choose(self, image: str, caption: str, group: str | None = None) -> None:
        """Read these columns, or map the cache file that holds them; `caption` is `image` where none is read."""
        self.image, self.caption, self.group = image, caption, group
        self.split = by_lower_name(self.columns).get(COLUMN)
        self.wanted = list(dict.fromkeys(filter(None, (image, caption, group, self.split))))
        self.table = self._in_memory_or_cached("cells", self.wanted, self.schema(), self.batches)

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The types of the columns of `table`."""

    @abstractmethod
    def batches(self) -> Iterator[pa.RecordBatch]:
        """Read the rows of `table`, some at a time."""

    def image_keys(self, hashed: bool) -> pa.LargeBinaryArray | None:
        """Key shared by rows of one image, empty without an image; None if images are bytes and not `hashed`."""
        column = self.table.column(0)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if is_bytes(column.type):
            return pa.array(map(_key_of, column), pa.large_binary()) if hashed else None
        return combined(column.cast(pa.large_binary()).fill_null(b""))

    def split_cells(self, cells: pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
        """The split of each row as text, null where the row is unreadable."""
        return pa.array(["" if cell is None else str(cell) for cell in cells.to_pylist()], pa.string())

    def place(self, number: int) -> str:
        """The key of a row without an image; raises `BrokenPair` if it is unreadable."""
        return f"row {number}"

    def value(self, cell: pa.Scalar, key: str) -> Any:
        """The value of a cell of `table`; raises `BrokenPair`."""
        return decoded(cell, key)

    def pair(self, numbers: list[int]) -> TableRow:
        """The pair of these rows of `table`; raises `BrokenPair`."""
        key, *_ = map(self.place, numbers)
        image: Any = self.table.column(0)[numbers[0]]  # its bytes are not copied before they are needed
        if not is_bytes(image.type):
            image = self.value(image, key)
            key = image if image and isinstance(image, str) else key

        def cells(name: str) -> list[Any]:
            column = self.table.column(self.wanted.index(name))
            return [b"" if is_bytes(column.type) else self.value(column[number], key) for number in numbers]

        return TableRow(key, image, cells(self.caption), cells(self.group)[0] if self.group else None)

    def splits(self) -> dict[str, np.ndarray]:
        """Places of the pairs of each split. A pair with rows in several is in the last: test before train."""
        if self.split is None:
            return {}
        cells = self.split_cells(self.table.column(self.wanted.index(self.split)))
        numbers = split_numbers(cells, f"Column '{self.split}' of '{self.path.name}'")
        if numbers is not None:
            rows, starts = self._pairs.flatten().to_numpy(), self._pairs.offsets.to_numpy()
            # (rows,) -> (pairs,)
            numbers = np.maximum.reduceat(numbers[rows], starts[:-1])
        return places_by_split(numbers)

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> TableRow:
        """Locate a pair; raises `BrokenPair`."""
        return self.pair(self.numbers(index))

    def numbers(self, index: int) -> list[int]:
        """The rows of a pair in `table`."""
        return self._pairs[index].as_py()

    @cached_property
    def _pairs(self) -> pa.Array:
        """The rows of each pair."""
        merged = self.caption != self.image

        def group() -> Iterator[pa.RecordBatch]:
            # Hashing images pays only if captions are merged.
            keys = self.image_keys(hashed=merged)
            rows = len(self.table)
            order, starts = (np.arange(rows), np.arange(rows + 1)) if keys is None else group_rows(keys)
            yield pa.record_batch([pa.LargeListArray.from_arrays(starts, pa.array(order))], ["rows"])

        kind = pa.schema([("rows", pa.large_list(pa.int64()))])
        return combined(self._in_memory_or_cached("rows", [self.image, merged], kind, group)["rows"])

    def _in_memory_or_cached(
        self, kind: str, options: list[Any], schema: pa.Schema, batches: Callable[[], Iterator[pa.RecordBatch]]
    ) -> pa.Table:
        """A table in memory or, if it is large, in the cache."""
        try:
            if not self.large:
                return pa.Table.from_batches(batches(), schema)
            version = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files]
            return cached_table(f"tables/{kind}", (*version, options), lambda: (schema, batches()))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{self.path}' cannot be read: {error}.") from error


class ParquetRows(TableRows):
    """A Parquet file, or several: those of a folder or a pattern, in the order of their names.

    Images are paths, bytes, or structs of `bytes` and `path`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if path.is_dir():
            self.files = list(map(Path, files_in(path, ".parquet")))
            splits = {name[0].lower() for file in self.files if (name := SPLIT.match(file.name))}
            if len(splits) > 1:
                one = path / f"{min(splits)}*.parquet"
                raise UserError(f"'{path}' has the splits {', '.join(sorted(splits))}. Name the files of one: '{one}'.")
        elif not path.is_file():
            self.files = [Path(file) for file in expand(str(path))]
        self.folder = Path(os.path.commonpath([file.parent for file in self.files]))
        footers = [_footer(file) for file in self.files]
        self.arrow_schema = footers[0].schema.to_arrow_schema()
        self.columns = self.arrow_schema.names
        self._rows = [footer.num_rows for footer in footers]
        # Counted over all columns: asking pyarrow 26 for one column ends the process where the file is damaged.
        size = sum(data.row_group(group).total_byte_size for data in footers for group in range(data.num_row_groups))
        self.large = size > LARGE_TABLE or sum(self._rows) > MANY_ROWS

    def schema(self) -> pa.Schema:
        return pa.schema([self.arrow_schema.field(name) for name in self.wanted])

    def batches(self) -> Iterator[pa.RecordBatch]:
        schema = self.schema()
        for path, count in zip(self.files, self._rows, strict=True):
            file, most = pq.ParquetFile(path), max(MOST_GROWTH * path.stat().st_size, MOST_IN_PARQUET)
            types = {field.name: field.type for field in file.schema_arrow}
            if other := [field.name for field in schema if types.get(field.name) != field.type]:
                raise UserError(
                    f"Column '{other[0]}' of '{self.files[0]}' is missing in '{path}' or of another type. Files of one "
                    "table have the same columns; name the others as another source."
                )
            size = rows = 0
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=self.wanted):
                size, rows = size + batch.nbytes, rows + len(batch)
                if size > most:
                    raise UserError(f"'{path}' is not read: its columns take more than {most:,} bytes.")
                # Rebuilt, since fields of the same type may differ in nullability and metadata.
                yield pa.RecordBatch.from_arrays(batch.select(self.wanted).columns, schema=schema)
            if rows != count:
                raise UserError(f"'{path}' cannot be read: it says {count:,} rows and has {rows:,}.")


def _footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not a Parquet file: {str(error).rstrip('.')}.") from error


def group_rows(images: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers ordered by the first row of their image, and the start of each group (groups + 1,) in them."""
    codes = images.dictionary_encode().indices.to_numpy()
    rows = np.arange(len(images))
    first = np.empty(len(images), np.int64)
    first[codes[::-1]] = rows[::-1]  # the last value written for a code is its first row
    groups = first[codes]
    empty = np.asarray(pc.binary_length(images)) == 0
    groups[empty] = rows[empty]
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1, append=len(images)))
    return order, starts


def _key_of(cell: pa.Scalar) -> bytes:
    """The hash of an image's bytes, else its path, else empty."""
    path = None
    if pa.types.is_struct(cell.type) and cell.is_valid:
        path = cell["path"] if cell.type.get_field_index("path") >= 0 else None
        cell = cell["bytes"]
    if cell.is_valid and (content := cell.as_buffer()).size:
        return hashlib.blake2b(content, digest_size=16).digest()
    return path.as_buffer().to_pybytes() if path is not None and path.is_valid else b""


def combined(column: pa.ChunkedArray) -> pa.Array:
    """Combine the chunks of a column, without a copy if it has one."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds an image's bytes, or a struct with such a field."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.StructType):
        return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view()) or pa.types.is_fixed_size_binary(kind)
