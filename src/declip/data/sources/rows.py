"""Rows of JSONL, CSV, TSV and Parquet tables, kept as columns or left in the file, never as Python objects."""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
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

DAMAGED = b"damaged"
"""Under this name a table's metadata keeps the rows that were left out."""

SCAN = 64 << 20
"""Bytes looked through at a time for line ends."""

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


class JsonLines:
    """A file with a JSON object a line; only where each line starts and its number are held, 16 bytes a row.

    Args:
        path: The file; blank lines are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.stat().st_size:
            raise UserError(f"The table '{path}' is empty. It needs a row for each pair.")
        self._bytes = np.memmap(path, np.uint8, "r")
        table = self._find() if len(self._bytes) <= LARGE_TEXT else cached_table(path, "jsonl", 1, self._write)
        self._starts, self._lines = (whole(table[name]).to_numpy() for name in ("start", "line"))
        if not len(self):
            raise UserError(f"The table '{path}' has no rows. It needs one for each pair.")
        self.columns: Sequence[str] = self._peek()

    def _find(self) -> pa.Table:
        """Where each line starts that is not blank, and its number from 1."""
        scans = range(0, len(self._bytes), SCAN)
        ends = [np.flatnonzero(self._bytes[i : i + SCAN] == ord("\n")) + i + 1 for i in scans]
        starts = np.concatenate([[0], *ends, [len(self._bytes)]]).astype(np.int64)
        lengths = np.diff(starts)
        filled = lengths > 2
        short = np.flatnonzero((lengths > 0) & ~filled)
        ends_of = (starts[short], starts[short + 1] - 1)
        filled[short] = np.maximum(*(self._bytes[place] for place in ends_of)) > ord(" ")
        lines = np.flatnonzero(filled)
        return pa.table({"start": starts[lines], "line": lines + 1})

    def _write(self, target: Path) -> None:
        write_mapped(self._find(), target)

    def _peek(self) -> list[str]:
        found: dict[str, None] = {}
        first: BrokenPair | None = None
        for index in range(min(PEEKED_ROWS, len(self))):
            try:
                found.update(dict.fromkeys(self._row(index)))
            except BrokenPair as error:
                first = first or error
        if first and not found:
            hint = ""
            if self._bytes[:PEEKED_BYTES].tobytes().decode(errors="replace").lstrip("\ufeff \r\n\t").startswith("["):
                hint = f" It is one JSON array; take it apart with: jq -c '.[]' {self.path.name} > rows.jsonl"
            raise UserError(f"'{self.path}' is not JSONL, a JSON object on each line: {first}.{hint}")
        return list(found)

    def choose(self, image: str, caption: str) -> None:
        """Take these two columns."""
        self._image, self._caption = image, caption

    def __len__(self) -> int:
        return len(self._starts)

    def _name(self, index: int) -> str:
        return f"line {self._lines[index]}"

    def _row(self, index: int) -> dict[str, Any]:
        start, key = self._starts[index], self._name(index)
        stop = self._starts[index + 1] if index + 1 < len(self) else len(self._bytes)
        if stop - start > LONGEST_ROW:
            raise BrokenPair("unreadable row", key, f"{stop - start:,} bytes long")
        line = text_of(self._bytes[start:stop].tobytes(), key)
        try:
            row = json.loads(line.removeprefix("\ufeff"))
        except (ValueError, RecursionError) as error:
            raise BrokenPair("unreadable row", key, f"not JSON: {error}") from error
        if not isinstance(row, dict):
            raise BrokenPair("unreadable row", key, "not a JSON object")
        return row

    def key(self, index: int) -> str:
        """The image's path, else the line's number."""
        image = self._row(index).get(self._image)
        return image if image and isinstance(image, str) else self._name(index)

    def image(self, index: int) -> str | None:
        """The image's path; raises `BrokenPair`."""
        image = self._row(index).get(self._image)
        if image is None or isinstance(image, str):
            return image
        raise BrokenPair("missing image", self._name(index), f"{self._image} is no path: {str(image)[:40]}")

    def cell(self, index: int, column: str) -> Any:
        """What a row has in any column, None where it has none; raises `BrokenPair`."""
        return self._row(index).get(column)

    def captions(self, index: int) -> list[str | None]:
        """The captions as written; raises `BrokenPair`."""
        found = self._row(index).get(self._caption)
        captions = found if isinstance(found, list) else [found]
        if all(caption is None or isinstance(caption, str) for caption in captions):
            return captions
        raise BrokenPair("unreadable row", self.key(index), f"{self._caption} is no text: {str(found)[:40]}")


class Delimited:
    """A CSV or TSV file; quotes as in a spreadsheet's export, line ends inside quotes allowed.

    Rows of the same image path are merged. Rows with too few or too many cells come last, each a broken pair.

    Args:
        path: The file; its first line names the columns.
        delimiter: What stands between cells.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        self.path, self.delimiter = path, delimiter
        with path.open("rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"The table '{path}' is UTF-16. Save it as UTF-8.")
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as lines:
            try:
                self.columns: Sequence[str] = next(csv.reader(lines, delimiter=delimiter), [])
            except csv.Error as error:
                raise UserError(f"The first line of '{path}' does not name columns: {error}.") from error
        if not self.columns:
            raise UserError(
                f"The table '{path}' is empty. It needs a line that names its columns and one for each pair."
            )

    def choose(self, image: str, caption: str) -> None:
        """Read these two columns and merge the rows that share an image, or map the cache file that holds them."""
        if self.path.stat().st_size <= LARGE_TEXT:
            table = self._read(image, caption)
        else:
            made_of = (self.delimiter, image, caption)
            table = cached_table(self.path, "csv", made_of, lambda to: write_mapped(self._read(image, caption), to))
        self._row, self._images, self._captions = (whole(table[name]) for name in ("row", "image", "captions"))
        self._damaged: list[tuple[int, str]] = json.loads(table.schema.metadata[DAMAGED])

    def _read(self, image: str, caption: str) -> pa.Table:
        """The pairs: number of the first row, the image's path, all captions; in the metadata the damaged rows."""
        damaged: list[tuple[int, str]] = []

        def note(row: pacsv.InvalidRow) -> str:
            damaged.append((row.number, f"{row.actual_columns} cells instead of {row.expected_columns}"))
            return "skip"

        wanted = list(dict.fromkeys((image, caption)))
        try:
            table = pacsv.read_csv(
                self.path,
                pacsv.ReadOptions(use_threads=False, block_size=LONGEST_ROW),
                pacsv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=note),
                # Bytes, so that a row that is not UTF-8 breaks that row and not the table.
                pacsv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.large_binary())),
            )
        except pa.ArrowInvalid as error:
            raise UserError(f"'{self.path}' cannot be read as a table: {error}.") from error
        images, captions = (table[name].combine_chunks() for name in (image, caption))
        order, starts = group_rows(images)
        first = order[starts[:-1]]
        return pa.table(
            {
                "row": first,
                "image": images.take(pa.array(first)),
                "captions": pa.LargeListArray.from_arrays(starts, captions.take(pa.array(order))),
            }
        ).replace_schema_metadata({DAMAGED: json.dumps(damaged)})

    def __len__(self) -> int:
        return len(self._row) + len(self._damaged)

    def _check(self, index: int) -> None:
        """Raise `BrokenPair` where the row was damaged."""
        if index >= len(self._row):
            number, detail = self._damaged[index - len(self._row)]
            raise BrokenPair("unreadable row", f"row {number}", detail)

    def key(self, index: int) -> str:
        """The image's path, else the number of the row, the header being row 1."""
        self._check(index)
        return self._images[index].as_py().decode(errors="replace") or f"row {self._row[index].as_py() + 2}"

    def image(self, index: int) -> str:
        """The image's path; raises `BrokenPair`."""
        self._check(index)
        return text_of(self._images[index].as_py(), self.key(index))

    def captions(self, index: int) -> list[str | None]:
        """The captions of all rows of the image; raises `BrokenPair`."""
        key = self.key(index)
        return [text_of(caption, key) for caption in self._captions[index].as_py()]


def group_rows(paths: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """Group the rows that have the same path, in the order in which each path is first met.

    Args:
        paths: n paths; an empty one is a group of its own.

    Returns:
        Row numbers ordered by group, int64 (n,), and where each group starts in them, int64 (groups + 1,).
    """
    codes = paths.dictionary_encode().indices.to_numpy().astype(np.int64)
    empty = np.asarray(pc.binary_length(paths)) == 0
    codes[empty] = len(paths) + np.flatnonzero(empty)
    order = np.argsort(codes, kind="stable")
    starts = np.flatnonzero(np.diff(codes[order], prepend=-1, append=2 * len(paths)))
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
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{self.path}' is damaged: {error}.") from error
        if len(table) != len(self):
            raise UserError(f"'{self.path}' is damaged: it holds {len(table):,} rows and says {len(self):,}.")
        self._images, self._captions = table[image], table[caption]

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
        return self._file.metadata.num_rows

    def key(self, index: int) -> str:
        """The image's path where the column holds paths, else the row's number, from 0."""
        if is_bytes(self._images.type):
            return f"row {index}"
        try:
            return self._images[index].as_py() or f"row {index}"
        except UnicodeDecodeError:
            return f"row {index}"

    def image(self, index: int) -> str | bytes | None:
        """The image's bytes where there are any, else its path; raises `BrokenPair`."""
        try:
            cell = self._images[index].as_py()
        except UnicodeDecodeError as error:
            raise BrokenPair("invalid text", self.key(index), f"not UTF-8: {error}") from error
        return cell.get("bytes") or cell.get("path") if isinstance(cell, dict) else cell

    def captions(self, index: int) -> list[str | None]:
        """The captions as written; raises `BrokenPair`."""
        try:
            cell = self._captions[index].as_py()
        except UnicodeDecodeError as error:
            raise BrokenPair("invalid text", self.key(index), f"not UTF-8: {error}") from error
        return cell if isinstance(cell, list) else [cell]


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
