"""Rows of JSONL and Parquet tables, held as columns or left in the file, never as Python objects."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from array import array
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from declip.data.pair import BrokenPair, clean_keywords
from declip.errors import UserError
from declip.io.memo import cached_table

LONGEST_ROW = 16 << 20
"""Bytes. A longer row is a file with a lost quote or line end, not a pair."""

HELD_IN_MEMORY = 1 << 30
"""Bytes of images in a Parquet file up to which they are held in memory. Parquet cannot be read row by row, so beyond
it the wanted columns are copied once into a cache file that is mapped into memory."""

MANY_ROWS = 250_000
"""Rows of a Parquet file beyond which its columns are mapped however small they are: each rank of a run opens the
table, and each would hold 160 bytes a row."""

LARGE_TEXT = 32 << 20
"""Bytes of a JSONL, CSV or TSV file beyond which its index is mapped from the cache."""

MOST_GROWTH = 100
"""Largest ratio of the decompressed columns to a Parquet file's size, beyond `HELD_IN_MEMORY`."""

COPIED_ROWS, PATHS_COPIED = 256, 1 << 16
"""Rows copied at a time, with and without the images themselves; fewer save memory, more save time."""

PEEKED_BYTES = 1024
PEEKED_ROWS = 100
"""Rows of a JSONL file read to learn its columns, since no header lists them."""

SEPARATORS = re.compile("[;,]")
LATIN_1 = "if the file is Latin-1, convert it: iconv -f latin1 -t utf-8"


def text_of(cell: bytes, key: str) -> str:
    """Decode a cell; raises `BrokenPair` where it is not UTF-8."""
    try:
        return cell.decode()
    except UnicodeDecodeError as error:
        raise BrokenPair("invalid text", key, f"not UTF-8: {error}; {LATIN_1}") from error


class TableRow(ABC):
    """A pair of a table, parsed once; `key` is the image's path, else the number of its row or line."""

    key: str

    @abstractmethod
    def image(self) -> str | bytes | None:
        """The image's path or content, None where the cell is empty; raises `BrokenPair`, as every method below."""

    @abstractmethod
    def captions(self) -> list[str | None]:
        """The captions of all rows of the image, as written."""

    @abstractmethod
    def keyword_cells(self) -> Iterable[Any]:
        """The keyword cells of all rows of the image: lists or texts; none without such a column."""

    def keywords(self) -> tuple[str, ...]:
        """The keywords: elements of lists, or parts of a text separated by ";" or ","."""
        cells = self.keyword_cells()
        return clean_keywords(w for c in cells for w in (SEPARATORS.split(c) if isinstance(c, str) else c or ()))


class TableRows(ABC):
    """The wanted columns of a table as pairs: rows of the same image are one, in the order of their first row."""

    columns: Sequence[str]
    """All columns of the table."""

    @abstractmethod
    def choose(self, image: str, caption: str, keywords: str | None = None) -> None:
        """Name the wanted columns, before anything below is used."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def row(self, index: int) -> TableRow:
        """Read and parse a pair once, without its image's content; raises `BrokenPair`."""


@dataclass(frozen=True)
class JsonRow(TableRow):
    """The parsed lines of one image."""

    key: str
    name: str
    lines: list[dict[str, Any]]
    columns: tuple[str, str, str | None]

    def image(self) -> str | None:
        image = self.lines[0].get(self.columns[0])
        if image is None or isinstance(image, str):
            return image
        raise BrokenPair("missing image", self.name, f"{self.columns[0]} is no path: {str(image)[:40]}")

    def captions(self) -> list[str | None]:
        texts: list[str | None] = []
        for cell in self.cells(self.columns[1]):
            texts += cell if isinstance(cell, list) else [cell]
            if not all(text is None or isinstance(text, str) for text in texts):
                raise BrokenPair("unreadable row", self.key, f"{self.columns[1]} is no text: {str(cell)[:40]}")
        return texts

    def keyword_cells(self) -> list[Any]:
        cells = [] if self.columns[2] is None else self.cells(self.columns[2])
        return [cell for cell in cells if isinstance(cell, str | list)]

    def cells(self, column: str) -> list[Any]:
        """The value of any column in each line, None where it is missing."""
        return [line.get(column) for line in self.lines]


class JsonRows(TableRows):
    """A file with a JSON object per line, blank lines ignored; only the lines' places are held, 32 bytes each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.stat().st_size:
            raise UserError(f"The table '{path}' is empty. It needs a row for each pair.")
        self._bytes = np.memmap(path, np.uint8, "r")
        self.columns: Sequence[str] = self._peek()

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

    def _peek(self) -> list[str]:
        columns: dict[str, None] = {}
        first: BrokenPair | None = None
        rows = 0
        for _, _, number, line in islice(self._lines(), PEEKED_ROWS):
            rows += 1
            try:
                columns.update(dict.fromkeys(parse_line(line, number)))
            except BrokenPair as error:
                first = first or error
        if not rows:
            raise UserError(f"The table '{self.path}' has no rows. It needs one for each pair.")
        if first and not columns:
            hint = ""
            if self._bytes[:PEEKED_BYTES].tobytes().decode(errors="replace").lstrip("\ufeff \r\n\t").startswith("["):
                hint = f" It is one JSON array; take it apart with: jq -c '.[]' {self.path.name} > rows.jsonl"
            raise UserError(f"'{self.path}' is not JSONL, a JSON object on each line: {first}.{hint}")
        return list(columns)

    def choose(self, image: str, caption: str, keywords: str | None = None) -> None:
        self._image, self._wanted = image, (image, caption, keywords)
        if len(self._bytes) <= LARGE_TEXT:
            table = self._find()
        else:
            table = cached_table(self.path, "jsonl", (2, image), lambda to: write_mapped(self._find(), to))
        self._places = whole(table["lines"])

    def _find(self) -> pa.Table:
        """The lines of each pair: start, size and number of each."""
        places, keys, parts = array("q"), list[bytes](), list[pa.Array]()
        for start, size, number, line in self._lines():
            places.extend((start, size, number))
            try:
                image = parse_line(line, number).get(self._image)
            except BrokenPair:
                image = None
            keys.append(image.encode(errors="surrogatepass") if isinstance(image, str) else b"")
            if len(keys) == PATHS_COPIED:
                parts.append(pa.array(keys, pa.large_binary()))
                keys.clear()
        parts.append(pa.array(keys, pa.large_binary()))
        order, starts = group_rows(pa.concat_arrays(parts))
        lines = np.frombuffer(places, np.int64).reshape(-1, 3)[order]
        cells = pa.FixedSizeListArray.from_arrays(pa.array(lines.ravel()), 3)
        return pa.table({"lines": pa.LargeListArray.from_arrays(starts, cells)})

    def __len__(self) -> int:
        return len(self._places)

    def row(self, index: int) -> JsonRow:
        places = self._places[index].as_py()
        name = f"line {places[0][2]}"
        lines = [
            parse_line(self._bytes[start : start + min(size, LONGEST_ROW + 1)].tobytes(), number)
            for start, size, number in places
        ]
        image = lines[0].get(self._image)
        return JsonRow(image if image and isinstance(image, str) else name, name, lines, self._wanted)


def parse_line(line: bytes, number: int) -> dict[str, Any]:
    """Read a line of JSON; raises `BrokenPair` where it is no object, or longer than a row may be."""
    key = f"line {number}"
    if len(line) > LONGEST_ROW:
        raise BrokenPair("unreadable row", key, f"more than {LONGEST_ROW:,} bytes long")
    try:
        row = json.loads(text_of(line, key).removeprefix("\ufeff"))
    except (ValueError, RecursionError) as error:
        raise BrokenPair("unreadable row", key, f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise BrokenPair("unreadable row", key, "not a JSON object")
    return row


def group_rows(paths: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """Group the rows that have the same image, in the order of each image's first row.

    Args:
        paths: n paths or hashes of images; an empty one is a group of its own.

    Returns:
        Row numbers ordered by group, int64 (n,), and the start of each group in them, int64 (groups + 1,).
    """
    codes = paths.dictionary_encode().indices.to_numpy()
    rows = np.arange(len(paths))
    first = np.empty(len(paths), np.int64)
    first[codes[::-1]] = rows[::-1]  # the last value written to a code stays, which is its first row
    groups = first[codes]
    empty = np.asarray(pc.binary_length(paths)) == 0
    groups[empty] = rows[empty]
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1, append=len(paths)))
    return order, starts


@dataclass(frozen=True)
class ParquetRow(TableRow):
    """The rows of one image."""

    key: str
    cell: pa.Scalar
    numbers: list[int]
    texts: pa.ChunkedArray
    words: pa.ChunkedArray | None

    def image(self) -> str | bytes | None:
        cell = plain(self.cell, self.key)
        return cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell

    def captions(self) -> list[str | None]:
        cells = (plain(self.texts[number], self.key) for number in self.numbers)
        return [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]

    def keyword_cells(self) -> list[Any]:
        return [] if self.words is None else [plain(self.words[number], self.key) for number in self.numbers]


class ParquetRows(TableRows):
    """A Parquet file; images as paths, as bytes, or as structs of `bytes` and `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{path}' is not a Parquet file: {str(error).rstrip('.')}.") from error
        self.columns: Sequence[str] = self._file.schema_arrow.names

    def choose(self, image: str, caption: str, keywords: str | None = None) -> None:
        """Read these columns, or map the cache file that holds them; `caption` is `image` where none is read."""
        schema = self._file.schema_arrow
        if keywords is not None and not is_text(schema.field(keywords).type, lists=True):
            keywords = None
        if caption != image and not is_text(schema.field(caption).type, lists=True):
            raise UserError(
                f"Column '{caption}' of '{self.path}' holds {schema.field(caption).type}; captions are a string or a "
                "list of strings."
            )
        if not (is_text(schema.field(image).type) or is_bytes(schema.field(image).type)):
            raise UserError(
                f"Column '{image}' of '{self.path}' holds {schema.field(image).type}; images are a path, bytes, or a "
                "struct of bytes and path."
            )
        wanted = list(dict.fromkeys(filter(None, (image, caption, keywords))))
        try:
            rows = self._file.metadata.num_rows
            large = self._size() > HELD_IN_MEMORY or rows > MANY_ROWS
            if large:
                table = cached_table(self.path, "parquet", wanted, lambda to: self._copy(wanted, to))
            else:
                table = pa.Table.from_batches(self._batches(wanted), self._schema(wanted))
            if len(table) != rows:
                raise UserError(f"'{self.path}' is damaged: it holds {len(table):,} rows and says {rows:,}.")
            self._images, self._captions = table[image], table[caption]
            self._keywords = None if keywords is None else table[keywords]
            merged, made_of = caption != image, [image, caption] if caption != image else [image]
            if large:
                table = cached_table(self.path, "rows", made_of, lambda to: write_mapped(self._find(merged), to))
            else:
                table = self._find(merged)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{self.path}' is damaged: {error}.") from error
        self._rows = whole(table["rows"])

    def _find(self, merged: bool) -> pa.Table:
        """The numbers of each pair's rows; hashing images is worth its time only where captions are merged."""
        if not merged and is_bytes(self._images.type):
            order, starts = np.arange(len(self._images)), np.arange(len(self._images) + 1)
        else:
            order, starts = group_rows(image_keys(self._images))
        return pa.table({"rows": pa.LargeListArray.from_arrays(starts, pa.array(order))})

    def _size(self) -> int:
        """Bytes of the decompressed values according to the file.

        Counted over all columns: asking pyarrow 26 for one column ends the process where the file is damaged.
        """
        data = self._file.metadata
        return sum(data.row_group(group).total_byte_size for group in range(data.num_row_groups))

    def _schema(self, columns: list[str]) -> pa.Schema:
        return pa.schema([self._file.schema_arrow.field(name) for name in columns])

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Read a few rows at a time, since a value that is stored once can be repeated in millions of rows."""
        most, total = max(MOST_GROWTH * self.path.stat().st_size, HELD_IN_MEMORY), 0
        rows = COPIED_ROWS if any(is_bytes(field.type) for field in self._schema(columns)) else PATHS_COPIED
        pending: list[pa.RecordBatch] = []
        for batch in self._file.iter_batches(COPIED_ROWS, columns=columns):
            total += batch.nbytes
            if total > most:
                raise UserError(
                    f"'{self.path}' is not read: its columns {', '.join(columns)} take more than {most:,} bytes, "
                    f"{MOST_GROWTH} times the file's size."
                )
            pending.append(batch.select(columns))
            if len(pending) * COPIED_ROWS >= rows:
                yield from pa.Table.from_batches(pending).combine_chunks().to_batches()
                pending = []
        if pending:
            yield from pa.Table.from_batches(pending).combine_chunks().to_batches()

    def _copy(self, columns: list[str], target: Path) -> None:
        with pa.ipc.new_file(str(target), self._schema(columns)) as writer:
            for batch in self._batches(columns):
                writer.write_batch(batch)

    def __len__(self) -> int:
        return len(self._rows)

    def numbers(self, index: int) -> list[int]:
        """The rows of a pair, from 0."""
        return self._rows[index].as_py()

    def row(self, index: int) -> ParquetRow:
        """See `TableRows`; the key is the image's path where the column holds paths, else the row's number, from 0."""
        numbers = self.numbers(index)
        image, key = self._images[numbers[0]], f"row {numbers[0]}"
        if not is_bytes(image.type):
            with suppress(UnicodeDecodeError):
                key = image.as_py() or key
        return ParquetRow(key, image, numbers, self._captions, self._keywords)


def plain(cell: pa.Scalar, key: str) -> Any:
    """A cell as a Python object; raises `BrokenPair` where it holds text that is not UTF-8."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise BrokenPair("invalid text", key, f"not UTF-8: {error}") from error


def image_keys(column: pa.ChunkedArray) -> pa.LargeBinaryArray:
    """Identities of the images of a column: the hash of an image's bytes, else its path, else nothing."""
    if is_bytes(column.type):
        return pa.array((_key_of(cell) for cell in column), pa.large_binary())
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


def write_mapped(table: pa.Table, path: Path) -> None:
    """Write a table to an Arrow file as one batch."""
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table.combine_chunks())


def is_text(kind: pa.DataType, lists: bool = False) -> bool:
    """Whether a column of this type holds strings or, if `lists`, lists of strings."""
    types = pa.types
    if types.is_dictionary(kind) or (
        lists and (types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))
    ):
        return is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds an image's bytes, or a struct with such a field."""
    types = pa.types
    if types.is_struct(kind):
        return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)
