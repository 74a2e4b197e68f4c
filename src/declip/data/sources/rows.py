"""Rows of JSONL and Parquet tables, kept as columns or left in the file, never as Python objects."""

import hashlib
import json
from array import array
from codecs import BOM_UTF8
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from declip.data.pair import BrokenPair
from declip.errors import UserError
from declip.io.memo import cached_table

LONGEST_ROW = 16 << 20
"""Bytes. A longer row is a file with a lost quote or line end, not a pair."""

HELD_IN_MEMORY = 1 << 30
"""Bytes of images in a Parquet file up to which they are held in memory; Parquet cannot be read row by row, so
beyond it the two columns are copied once into a cache file that is mapped into memory."""

MANY_ROWS = 250_000
"""Rows of a Parquet file beyond which its two columns are mapped likewise, however small: each rank of a run opens
the table, and each would hold 160 bytes a row."""

LARGE_TEXT = 32 << 20
"""Bytes of a JSONL, CSV or TSV file beyond which what is held of each row is mapped from the cache likewise."""

MOST_GROWTH = 100
"""How many times a Parquet file's size its two columns may take, beyond `HELD_IN_MEMORY`."""

COPIED_ROWS, PATHS_COPIED = 256, 1 << 16
"""Rows copied at a time, with and without the images themselves; fewer keep memory small, more make reading quick."""

PEEKED_BYTES = 1024
PEEKED_ROWS = 100
"""Rows of a JSONL file read to learn its columns, since no header lists them."""


def text_of(cell: bytes, key: str) -> str:
    """Decode a cell; raises `BrokenPair` where it is not UTF-8."""
    try:
        return cell.decode()
    except UnicodeDecodeError as error:
        raise BrokenPair("invalid text", key, f"not UTF-8: {error}") from error


@dataclass(frozen=True)
class Row:
    """A pair of a table, read and parsed once.

    Attributes:
        key: The image's path, else the row's or line's number.
        image: Gives the image's path or content, None where the cell is empty; raises `BrokenPair`.
        captions: Gives the captions as written, those of all rows of the image; raises `BrokenPair`.
    """

    key: str
    image: Callable[[], str | bytes | None]
    captions: Callable[[], list[str | None]]


class JsonLines:
    """A file with a JSON object a line; only where each line lies and its number are held, 32 bytes a row.

    Args:
        path: The file; blank lines are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.stat().st_size:
            raise UserError(f"The table '{path}' is empty. It needs a row for each pair.")
        self._bytes = np.memmap(path, np.uint8, "r")
        self.columns: Sequence[str] = self._peek()

    def _lines(self) -> Iterator[tuple[int, int, int, bytes]]:
        """Each line that is not blank: where it starts, its bytes, its number from 1, and what it says.

        What it says is cut off where it is longer than a row may be.
        """
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
        found: dict[str, None] = {}
        first: BrokenPair | None = None
        rows = 0
        for _, _, number, line in islice(self._lines(), PEEKED_ROWS):
            rows += 1
            try:
                found.update(dict.fromkeys(parse_line(line, number)))
            except BrokenPair as error:
                first = first or error
        if not rows:
            raise UserError(f"The table '{self.path}' has no rows. It needs one for each pair.")
        if first and not found:
            hint = ""
            if self._bytes[:PEEKED_BYTES].tobytes().decode(errors="replace").lstrip("\ufeff \r\n\t").startswith("["):
                hint = f" It is one JSON array; take it apart with: jq -c '.[]' {self.path.name} > rows.jsonl"
            raise UserError(f"'{self.path}' is not JSONL, a JSON object on each line: {first}.{hint}")
        return list(found)

    def choose(self, image: str, caption: str) -> None:
        """Take these two columns and merge the lines that share an image, or map the cache file that says which do."""
        self._image, self._caption = image, caption
        if len(self._bytes) <= LARGE_TEXT:
            table = self._find()
        else:
            table = cached_table(self.path, "jsonl", (2, image), lambda to: write_mapped(self._find(), to))
        self._places = whole(table["lines"])

    def _find(self) -> pa.Table:
        """The lines of each pair: where each starts, its bytes, its number."""
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

    def _read(self, index: int) -> tuple[str, list[dict[str, Any]]]:
        """The name of a pair's first line, and all its lines; raises `BrokenPair`."""
        places = self._places[index].as_py()
        lines = [
            parse_line(self._bytes[start : start + min(size, LONGEST_ROW + 1)].tobytes(), number)
            for start, size, number in places
        ]
        return f"line {places[0][2]}", lines

    def row(self, index: int) -> Row:
        """Read a pair; raises `BrokenPair` where a line cannot be."""
        name, lines = self._read(index)
        image = lines[0].get(self._image)
        key = image if image and isinstance(image, str) else name

        def path() -> str | None:
            if image is None or isinstance(image, str):
                return image
            raise BrokenPair("missing image", name, f"{self._image} is no path: {str(image)[:40]}")

        def captions() -> list[str | None]:
            texts: list[str | None] = []
            for cell in (line.get(self._caption) for line in lines):
                texts += cell if isinstance(cell, list) else [cell]
                if not all(text is None or isinstance(text, str) for text in texts):
                    raise BrokenPair("unreadable row", key, f"{self._caption} is no text: {str(cell)[:40]}")
            return texts

        return Row(key, path, captions)

    def cells(self, index: int, column: str) -> list[Any]:
        """What the lines of a pair have in any column, None where they have nothing; raises `BrokenPair`."""
        return [line.get(column) for line in self._read(index)[1]]


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
    """Group the rows that have the same image, in the order in which each image is first met.

    Args:
        paths: n paths, or what else tells images apart; an empty one is a group of its own.

    Returns:
        Row numbers ordered by group, int64 (n,), and where each group starts in them, int64 (groups + 1,).
    """
    codes = paths.dictionary_encode().indices.to_numpy()
    rows = np.arange(len(paths))
    first = np.empty(len(paths), np.int64)
    first[codes[::-1]] = rows[::-1]  # of several rows with a code the last one written stays, which is the first
    groups = first[codes]
    empty = np.asarray(pc.binary_length(paths)) == 0
    groups[empty] = rows[empty]
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1, append=len(paths)))
    return order, starts


class ParquetRows:
    """A Parquet file; images as paths, as bytes, or as structs of `bytes` and `path`.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{path}' is not a Parquet file: {str(error).rstrip('.')}.") from error
        self.columns: Sequence[str] = self._file.schema_arrow.names

    def choose(self, image: str, caption: str) -> None:
        """Read these two columns, or map the cache file that holds them; the same twice where captions are not read."""
        schema = self._file.schema_arrow
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
        wanted = list(dict.fromkeys((image, caption)))
        try:
            large = self._size() > HELD_IN_MEMORY or self._file.metadata.num_rows > MANY_ROWS
            table = (
                self._mapped(wanted) if large else pa.Table.from_batches(self._batches(wanted), self._schema(wanted))
            )
            rows = self._file.metadata.num_rows
            if len(table) != rows:
                raise UserError(f"'{self.path}' is damaged: it holds {len(table):,} rows and says {rows:,}.")
            self._images, self._captions = table[image], table[caption]
            if large:
                table = cached_table(
                    self.path, "rows", wanted, lambda to: write_mapped(self._find(len(wanted) == 1), to)
                )
            else:
                table = self._find(len(wanted) == 1)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{self.path}' is damaged: {error}.") from error
        self._rows = whole(table["rows"])

    def _find(self, without_captions: bool) -> pa.Table:
        """The numbers of each pair's rows.

        Reading all images to compare them by their content is worth its time only for what each row says of them.
        """
        if without_captions and is_bytes(self._images.type):
            order, starts = np.arange(len(self._images)), np.arange(len(self._images) + 1)
        else:
            order, starts = group_rows(image_keys(self._images))
        return pa.table({"rows": pa.LargeListArray.from_arrays(starts, pa.array(order))})

    def _size(self) -> int:
        """Bytes that the values take once they are decompressed, as the file says.

        Of all columns: asking pyarrow 26 for those of one ends the process where the file is damaged.
        """
        data = self._file.metadata
        return sum(data.row_group(group).total_byte_size for group in range(data.num_row_groups))

    def _schema(self, columns: list[str]) -> pa.Schema:
        return pa.schema([self._file.schema_arrow.field(name) for name in columns])

    def _batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """Read a few rows at a time, for a value that is stored once can stand in millions of rows."""
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

    def _mapped(self, columns: list[str]) -> pa.Table:
        """Copy the columns to a file that can be mapped; once for each state of the table."""

        def copy(target: Path) -> None:
            with pa.ipc.new_file(str(target), self._schema(columns)) as writer:
                for batch in self._batches(columns):
                    writer.write_batch(batch)

        return cached_table(self.path, "parquet", columns, copy)

    def __len__(self) -> int:
        return len(self._rows)

    def numbers(self, index: int) -> list[int]:
        """The rows of a pair, from 0."""
        return self._rows[index].as_py()

    def row(self, index: int) -> Row:
        """Read a pair; its key is the image's path where the column holds paths, else the row's number, from 0."""
        numbers = self.numbers(index)
        image, key = self._images[numbers[0]], f"row {numbers[0]}"
        if not is_bytes(image.type):
            with suppress(UnicodeDecodeError):
                key = image.as_py() or key

        def content() -> str | bytes | None:
            cell = plain(image, key)
            return cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell

        def captions() -> list[str | None]:
            texts: list[str | None] = []
            for number in numbers:
                cell = plain(self._captions[number], key)
                texts += cell if isinstance(cell, list) else [cell]
            return texts

        return Row(key, content, captions)


def plain(cell: pa.Scalar, key: str) -> Any:
    """A cell as a Python object; raises `BrokenPair` where it holds text that is not UTF-8."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise BrokenPair("invalid text", key, f"not UTF-8: {error}") from error


def image_keys(column: pa.ChunkedArray) -> pa.LargeBinaryArray:
    """What tells the images of a column apart: the hash of an image's bytes, else its path, else nothing."""
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
