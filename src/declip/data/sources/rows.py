"""Rows of JSONL and Parquet tables, memory-mapped where the table is large, never held as Python objects."""

import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from declip.data.pair import BrokenPair, as_texts, clean_keywords
from declip.data.sources.shard_names import expand
from declip.errors import UserError
from declip.io.memo import cached_table

LONGEST_ROW = 16 << 20  # bytes. A longer row is a file with a lost quote or line end, not a pair.

LARGE_TABLE, MANY_ROWS = 32 << 20, 250_000
"""Bytes of a file (of the decompressed columns in Parquet), and rows of a Parquet file, beyond which the wanted columns
are copied once into a cache file that all processes map: each rank of a run opens the table."""

MOST_IN_PARQUET, MOST_GROWTH = 1 << 30, 100
"""Bytes that the columns of a Parquet file may take, and their largest ratio to the file's size beyond that."""

IMAGES_AT_ONCE, ROWS_AT_ONCE = 256, 1 << 16
"""Rows copied at a time, with and without the images themselves; fewer save memory, more save time."""

PEEKED_ROWS = 100  # rows of a JSONL file read to learn its columns, since no header lists them

SEPARATORS = re.compile("[;,]")

SPLIT = re.compile("(train|val|dev|test)(?![a-z])|validation", re.IGNORECASE)
"""Splits that begin the names of Parquet files, as the Hub has them: `train-00000-of-00002.parquet`."""


@dataclass(frozen=True)
class TableRow:
    """A pair of a table; its cells are decoded when they are asked for, by methods that raise `BrokenPair`."""

    key: str  # the image's path, else the number of its row or line
    image_cell: Any
    caption_cells: list[Any]  # one for each row of the image
    keyword_cells: list[Any]
    group_cell: Any = None  # of the first row

    def image(self) -> str | bytes | None:
        """The image's path or content, None where the cell is empty."""
        cell = self._decoded(self.image_cell)
        if cell and isinstance(self.image_cell, pa.StructScalar):
            cell = cell.get("bytes") or cell.get("path")
        if cell is None or isinstance(cell, str | bytes):
            return cell
        raise BrokenPair("missing image", self.key, f"its cell is no path: {str(cell)[:40]}")

    def values(self) -> list[Any]:
        """The captions' cells as they are, of any type."""
        return [self._decoded(cell) for cell in self.caption_cells]

    def captions(self) -> list[str | None]:
        """The captions as written, those of lists one by one."""
        return [text for cell in self.values() for text in as_texts(cell, "unreadable row", self.key)]

    def keywords(self) -> tuple[str, ...]:
        """The keywords: elements of lists, or parts of a text separated by ";" or ","."""
        cells = map(self._decoded, self.keyword_cells)
        lists = [SEPARATORS.split(cell) if isinstance(cell, str) else cell for cell in cells]
        return clean_keywords(word for words in lists if isinstance(words, list) for word in words)

    def group(self) -> int:
        """A hash of the group's cell, 63 bits; 0 where the cell is empty or cannot be read."""
        cell = None
        with suppress(BrokenPair):
            cell = self._decoded(self.group_cell)
        if cell is None or cell == "":
            return 0
        digest = hashlib.blake2b(str(cell).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest) >> 1 | 1

    def _decoded(self, cell: Any) -> Any:
        try:
            return cell.as_py() if isinstance(cell, pa.Scalar) else cell
        except UnicodeDecodeError as error:
            raise not_utf8(self.key, error) from error


def not_utf8(key: str, error: UnicodeDecodeError) -> BrokenPair:
    hint = "if the file is Latin-1, convert it: iconv -f latin1 -t utf-8"
    return BrokenPair("invalid text", key, f"not UTF-8: {error}; {hint}")


class TableRows(ABC):
    """The wanted columns of a table as pairs: rows of the same image are one, in the order of their first row."""

    columns: Sequence[str]  # of the file
    wanted: list[str]  # those to read, each once
    table: pa.Table  # a column for each of `wanted`, in this order, then those that the format needs

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]

    @property
    def folder(self) -> Path:
        """The folder that image paths are relative to."""
        return Path(os.path.commonpath([file.parent for file in self.files]))

    def version(self) -> tuple[object, ...]:
        """Everything that the rows depend on, for the cache."""
        status = [(str(file.resolve()), file.stat()) for file in self.files]
        return tuple(item for name, stat in status for item in (name, stat.st_size, stat.st_mtime_ns))

    def choose(self, image: str, caption: str, keywords: str | None = None, group: str | None = None) -> None:
        """Read these columns, or map the cache file that holds them; `caption` is `image` where none is read."""
        self.image, self.caption, self.keywords, self.group = image, caption, keywords, group
        self.wanted = list(dict.fromkeys(filter(None, (image, caption, keywords, group))))
        self._large = self.is_large()
        self.table = self._kept("columns", self.wanted, self.schema(), self.batches)

    @abstractmethod
    def schema(self) -> pa.Schema:
        """The types of the columns of `table`."""

    @abstractmethod
    def batches(self) -> Iterator[pa.RecordBatch]:
        """Read the rows of `table`, some at a time."""

    @abstractmethod
    def name_of(self, number: int) -> str:
        """The key of a row that names no path; raises `BrokenPair` where the row is damaged."""

    def pair(self, numbers: list[int]) -> TableRow:
        """The pair of these rows of `table`; raises `BrokenPair`."""
        key, image = self.name_of(numbers[0]), self.column(self.image)[numbers[0]]
        if not is_bytes(image.type):
            with suppress(UnicodeDecodeError):
                key = image.as_py() or key
        group = next(iter(self._cells(self.group, numbers[:1])), None)
        return TableRow(key, image, self._cells(self.caption, numbers), self._cells(self.keywords, numbers), group)

    def is_large(self) -> bool:
        """Whether the wanted columns are mapped from the cache."""
        return self.path.stat().st_size > LARGE_TABLE

    def __len__(self) -> int:
        return len(self._pairs)

    def row(self, index: int) -> TableRow:
        """Locate a pair; raises `BrokenPair`."""
        return self.pair(self.numbers(index))

    def numbers(self, index: int) -> list[int]:
        """The rows of a pair in `table`."""
        return self._pairs[index].as_py()

    def column(self, name: str) -> pa.ChunkedArray:
        """A wanted column."""
        return self.table.column(self.wanted.index(name))

    def _cells(self, name: str | None, numbers: list[int]) -> list[pa.Scalar]:
        return [] if name is None else [self.column(name)[number] for number in numbers]

    @cached_property
    def _pairs(self) -> pa.Array:
        """The rows of each pair. Hashing images is worth its time only where captions are merged."""
        merged = self.caption != self.image

        def group() -> Iterator[pa.RecordBatch]:
            images = self.column(self.image)
            if not merged and is_bytes(images.type):
                order, starts = np.arange(len(images)), np.arange(len(images) + 1)
            else:
                order, starts = group_rows(image_keys(images))
            yield pa.record_batch([pa.LargeListArray.from_arrays(starts, pa.array(order))], ["rows"])

        kind = pa.schema([("rows", pa.large_list(pa.int64()))])
        return whole(self._kept("rows", [self.image, merged], kind, group)["rows"])

    def _kept(
        self, kind: str, options: list[Any], schema: pa.Schema, batches: Callable[[], Iterator[pa.RecordBatch]]
    ) -> pa.Table:
        """A table in memory or, where it is large, in the cache."""
        try:
            if not self._large:
                return pa.Table.from_batches(batches(), schema)
            return cached_table(f"tables/{kind}", (*self.version(), options), lambda: (schema, batches()))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{self.path}' is damaged: {error}.") from error


class JsonRows(TableRows):
    """A file with a JSON object per line, blank lines ignored; only the lines' places are held."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        columns: dict[str, None] = {}
        error: BrokenPair | None = None
        line = b""
        for _, _, number, line in islice(self._lines(), PEEKED_ROWS):
            try:
                columns.update(dict.fromkeys(parse_line(line, number)))
            except BrokenPair as broken:
                error = error or broken
        if not line:
            raise UserError(f"The table '{path}' has no rows. It needs one for each pair.")
        if error and not columns:
            hint = f" If it is one JSON array: jq -c '.[]' {path.name} > rows.jsonl" if b"[" in line[:10] else ""
            raise UserError(f"'{path}' is not JSONL, a JSON object on each line: {error}.{hint}")
        self.columns = list(columns)
        self._bytes = np.memmap(path, np.uint8, "r")

    def _lines(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Each line that is not blank: its start, size and number from 1, and its content up to the longest row."""
        start = number = 0
        with self.path.open("rb") as file:
            while line := file.readline(LONGEST_ROW + 1):
                size, part, number = len(line), line, number + 1
                while part and not part.endswith(b"\n"):
                    part = file.readline(LONGEST_ROW)
                    size += len(part)
                if line.removeprefix(BOM_UTF8).strip():
                    yield start, size, number, line
                start += size

    def schema(self) -> pa.Schema:
        return pa.schema([("image", pa.large_string()), *((name, pa.int64()) for name in ("start", "size", "line"))])

    def batches(self) -> Iterator[pa.RecordBatch]:
        lines = self._lines()
        while part := list(islice(self._located(lines), ROWS_AT_ONCE)):
            images, *places = zip(*part, strict=True)
            paths = pa.array(images, pa.large_binary()).view(pa.large_string())
            yield pa.record_batch([paths, *(pa.array(column, pa.int64()) for column in places)], schema=self.schema())

    def _located(self, lines: Iterator[tuple[int, int, int, bytes]]) -> Iterator[tuple[bytes, int, int, int]]:
        for start, size, number, line in lines:
            image = None
            with suppress(BrokenPair):
                image = parse_line(line, number).get(self.image)
            yield image.encode(errors="surrogatepass") if isinstance(image, str) else b"", start, size, number

    def name_of(self, number: int) -> str:
        return f"line {self.table['line'][number]}"

    def pair(self, numbers: list[int]) -> TableRow:
        rows = []
        for number in numbers:
            start, size, place = (column[number].as_py() for column in self.table.columns[1:])
            rows.append(parse_line(self._bytes[start : start + min(size, LONGEST_ROW + 1)].tobytes(), place))
        image = rows[0].get(self.image)
        key = image if image and isinstance(image, str) else self.name_of(numbers[0])
        keywords = [] if self.keywords is None else [row.get(self.keywords) for row in rows]
        group = None if self.group is None else rows[0].get(self.group)
        return TableRow(key, image, [row.get(self.caption) for row in rows], keywords, group)


def parse_line(line: bytes, number: int) -> dict[str, Any]:
    """Read a line of JSON; raises `BrokenPair` where it is no object, or longer than a row may be."""
    key = f"line {number}"
    if len(line) > LONGEST_ROW:
        raise BrokenPair("unreadable row", key, f"more than {LONGEST_ROW:,} bytes long")
    try:
        row = json.loads(line.decode().removeprefix("\ufeff"))
    except UnicodeDecodeError as error:
        raise not_utf8(key, error) from error
    except (ValueError, RecursionError) as error:
        raise BrokenPair("unreadable row", key, f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BrokenPair("unreadable row", key, "not a JSON object")
    return row


class ArrowRows(TableRows):
    """A table with Arrow's types; images as paths, as bytes, or as structs of `bytes` and `path`."""

    arrow_schema: pa.Schema  # of all columns

    def check_types(self, image: str, caption: str) -> None:
        """Raise a `UserError` unless these columns can hold images and captions."""
        kind = self.arrow_schema.field(image).type
        if not (holds_text(kind) or is_bytes(kind)):
            allowed = "images are a path, bytes, or a struct of bytes and path"
            raise UserError(f"Column '{image}' of '{self.path}' holds {kind}; {allowed}.")
        kind = self.arrow_schema.field(caption).type
        if caption != image and not holds_text(kind, lists=True):
            raise UserError(
                f"Column '{caption}' of '{self.path}' holds {kind}; captions are a string or a list of strings."
            )

    def schema(self) -> pa.Schema:
        return pa.schema([self.arrow_schema.field(name) for name in self.wanted])

    def name_of(self, number: int) -> str:
        return f"row {number}"


class ParquetRows(ArrowRows):
    """A Parquet file, or several: those of a folder or a pattern, in the order of their names."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if path.is_dir():
            self.files = sorted(path.glob("*.parquet"))
            splits = {name[0].lower() for file in self.files if (name := SPLIT.match(file.name))}
            if len(splits) > 1:
                one = path / f"{min(splits)}*.parquet"
                raise UserError(f"'{path}' has the splits {', '.join(sorted(splits))}. Name the files of one: '{one}'.")
        elif not path.is_file():
            self.files = [Path(file) for file in expand(str(path))]
        footers = [_footer(file) for file in self.files]
        self.arrow_schema = footers[0].schema.to_arrow_schema()
        self.columns = self.arrow_schema.names
        self._rows = [footer.num_rows for footer in footers]
        # Counted over all columns: asking pyarrow 26 for one column ends the process where the file is damaged.
        self._size = sum(
            data.row_group(group).total_byte_size for data in footers for group in range(data.num_row_groups)
        )

    def is_large(self) -> bool:
        return self._size > LARGE_TABLE or sum(self._rows) > MANY_ROWS

    def batches(self) -> Iterator[pa.RecordBatch]:
        rows = IMAGES_AT_ONCE if any(is_bytes(column.type) for column in self.schema()) else ROWS_AT_ONCE
        parts = (
            part for file, count in zip(self.files, self._rows, strict=True) for part in self._bounded(file, count)
        )
        while some := list(islice(parts, rows // IMAGES_AT_ONCE)):
            yield from pa.Table.from_batches(some).combine_chunks().to_batches()

    def _bounded(self, path: Path, count: int) -> Iterator[pa.RecordBatch]:
        """Read a few rows at a time, since a value that is stored once can be repeated in millions of rows."""
        file, schema = pq.ParquetFile(path), self.schema()
        missing = {name for name in self.wanted if name not in file.schema_arrow.names}
        if missing or (other := [field for field in schema if file.schema_arrow.field(field.name).type != field.type]):
            raise UserError(
                f"'{path}' has other columns than '{self.files[0]}': {', '.join(missing) or other[0].name} is missing "
                "or of another type. Files of one table have the same columns; name the others as another source."
            )
        most = max(MOST_GROWTH * path.stat().st_size, MOST_IN_PARQUET)
        size = rows = 0
        for batch in file.iter_batches(IMAGES_AT_ONCE, columns=self.wanted):
            size, rows = size + batch.nbytes, rows + len(batch)
            if size > most:
                raise UserError(f"'{path}' is not read: its columns take more than {most:,} bytes.")
            # Built again, since fields of the same type may differ in what they say of nulls, and in metadata.
            yield pa.RecordBatch.from_arrays(batch.select(self.wanted).columns, schema=schema)
        if rows != count:
            raise UserError(f"'{path}' is damaged: it says {count:,} rows and has {rows:,}.")

    def name_of(self, number: int) -> str:
        if len(self.files) == 1:
            return f"row {number}"
        ends = np.cumsum(self._rows)
        file = int(np.searchsorted(ends, number, "right"))
        return f"{self.files[file].name} row {number - int(ends[file]) + self._rows[file]}"


def _footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not a Parquet file: {str(error).rstrip('.')}.") from error


def group_rows(images: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """Group the rows that have the same image, in the order of each image's first row; without image none is grouped.

    Returns:
        Row numbers ordered by group, int64 (n,), and the start of each group in them, int64 (groups + 1,).
    """
    codes = images.dictionary_encode().indices.to_numpy()
    rows = np.arange(len(images))
    first = np.empty(len(images), np.int64)
    first[codes[::-1]] = rows[::-1]  # the last value written to a code stays, which is its first row
    groups = first[codes]
    empty = np.asarray(pc.binary_length(images)) == 0
    groups[empty] = rows[empty]
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1, append=len(images)))
    return order, starts


def image_keys(column: pa.ChunkedArray) -> pa.LargeBinaryArray:
    """Identities of the images of a column: the hash of an image's bytes, else its path, else nothing."""
    if is_bytes(column.type):
        return pa.array(map(_key_of, column), pa.large_binary())
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return whole(column.cast(kind).cast(pa.large_binary()).fill_null(b""))


def _key_of(cell: pa.Scalar) -> bytes:
    path = None
    if pa.types.is_struct(cell.type) and cell.is_valid:
        path = cell["path"] if cell.type.get_field_index("path") >= 0 else None
        cell = cell["bytes"]
    if cell.is_valid and (content := cell.as_buffer()).size:
        return hashlib.blake2b(content, digest_size=16).digest()
    return path.as_buffer().to_pybytes() if path is not None and path.is_valid else b""


def whole(column: pa.ChunkedArray) -> pa.Array:
    """A column in one piece; no copy where it is, and none where it has no row."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def holds_text(kind: pa.DataType, lists: bool = False) -> bool:
    """Whether a column of this type holds strings or, if `lists`, lists of strings."""
    if isinstance(kind, pa.DictionaryType) or (
        lists and isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)
    ):
        return holds_text(kind.value_type)
    return kind in (pa.string(), pa.large_string(), pa.string_view())


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds an image's bytes, or a struct with such a field."""
    if isinstance(kind, pa.StructType):
        return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
    return kind in (pa.binary(), pa.large_binary(), pa.binary_view())
