"""Rows of JSONL, CSV, TSV and Parquet tables, kept as columns or left in the file, never as Python objects."""

import csv
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from declip.data.cache import cache_folder, written_beside
from declip.data.pairs import BrokenPair
from declip.errors import UserError

LONGEST_ROW = 16 << 20
"""Bytes. A longer row is a file with a lost quote or line end, not a pair."""

HELD_IN_MEMORY = 1 << 30
"""Bytes of images in a Parquet file up to which they are held in memory; Parquet cannot be read row by row, so
beyond it the two columns are copied once into a cache file that is mapped into memory."""

SCAN = 64 << 20
"""Bytes looked through at a time for line ends."""

PEEKED_ROWS = 100
"""Rows of a JSONL file read to learn its columns, since no header lists them."""


def text_of(cell: bytes, key: str) -> str:
    """Decode a cell; raises `BrokenPair` where it is not UTF-8."""
    try:
        return cell.decode()
    except UnicodeDecodeError as error:
        raise BrokenPair("invalid text", key, f"not UTF-8: {error}") from error


class JsonLines:
    """A file with a JSON object a line; only where each line starts is held, 8 bytes a row.

    Args:
        path: The file; blank lines are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.stat().st_size:
            raise UserError(f"The table '{path}' is empty. It needs a row for each pair.")
        self._bytes = np.memmap(path, np.uint8, "r")
        ends = [np.flatnonzero(self._bytes[i : i + SCAN] == ord("\n")) + i for i in range(0, len(self._bytes), SCAN)]
        stops = np.concatenate([*ends, [len(self._bytes)]]).astype(np.int64)
        starts = np.concatenate([[0], stops[:-1] + 1])
        lengths = stops - starts
        filled = lengths > 1
        filled[lengths == 1] = self._bytes[starts[lengths == 1]] > ord(" ")
        self._starts, self._stops = starts[filled], stops[filled]
        self._lines = np.flatnonzero(filled) + 1
        if not len(self):
            raise UserError(f"The table '{path}' has no rows. It needs one for each pair.")
        self.columns: Sequence[str] = self._peek()

    def _peek(self) -> list[str]:
        found: dict[str, None] = {}
        first: BrokenPair | None = None
        for index in range(min(PEEKED_ROWS, len(self))):
            try:
                found.update(dict.fromkeys(self._row(index)))
            except BrokenPair as error:
                first = first or error
        if first and not found:
            raise UserError(f"'{self.path}' is not JSONL, a JSON object on each line: {first}.")
        return list(found)

    def choose(self, image: str, caption: str) -> None:
        """Take these two columns."""
        self._image, self._caption = image, caption

    def __len__(self) -> int:
        return len(self._starts)

    def _name(self, index: int) -> str:
        return f"line {self._lines[index]}"

    def _row(self, index: int) -> dict[str, Any]:
        start, stop = self._starts[index], self._stops[index]
        key = self._name(index)
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
        """Read these two columns and find which rows share an image."""
        self._damaged: list[tuple[int, str]] = []
        wanted = list(dict.fromkeys((image, caption)))
        try:
            table = pacsv.read_csv(
                self.path,
                pacsv.ReadOptions(use_threads=False, block_size=LONGEST_ROW),
                pacsv.ParseOptions(
                    delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=self._note_damaged
                ),
                # Bytes, so that a row that is not UTF-8 breaks that row and not the table.
                pacsv.ConvertOptions(include_columns=wanted, column_types=dict.fromkeys(wanted, pa.large_binary())),
            )
        except pa.ArrowInvalid as error:
            raise UserError(f"'{self.path}' cannot be read as a table: {error}.") from error
        self._images, self._captions = (table[name].combine_chunks() for name in (image, caption))
        self._order, self._starts = group_rows(self._images)

    def _note_damaged(self, row: pacsv.InvalidRow) -> str:
        detail = f"{row.actual_columns} cells instead of {row.expected_columns}"
        self._damaged.append((row.number, detail))
        return "skip"

    def __len__(self) -> int:
        return len(self._starts) - 1 + len(self._damaged)

    def _members(self, index: int) -> np.ndarray:
        pairs = len(self._starts) - 1
        if index >= pairs:
            number, detail = self._damaged[index - pairs]
            raise BrokenPair("unreadable row", f"row {number}", detail)
        return self._order[self._starts[index] : self._starts[index + 1]]

    def key(self, index: int) -> str:
        """The image's path, else the number of the row, the header being row 1."""
        row = self._members(index)[0]
        return self._images[row].as_py().decode(errors="replace") or f"row {row + 2}"

    def image(self, index: int) -> str:
        """The image's path; raises `BrokenPair`."""
        return text_of(self._images[self._members(index)[0]].as_py(), self.key(index))

    def captions(self, index: int) -> list[str | None]:
        """The captions of all rows of the image; raises `BrokenPair`."""
        key = self.key(index)
        return [text_of(self._captions[row].as_py(), key) for row in self._members(index)]


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
        except (pa.ArrowException, OSError) as error:
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
            table = self._file.read(wanted) if self._size(image) <= HELD_IN_MEMORY else self._mapped(wanted)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"'{self.path}' is damaged: {error}.") from error
        self._images, self._captions = table[image], table[caption]

    def _size(self, column: str) -> int:
        """Bytes that the column's values take once they are decompressed."""
        data = self._file.metadata
        chunks = (data.row_group(g).column(c) for g in range(data.num_row_groups) for c in range(data.num_columns))
        return sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)

    def _mapped(self, columns: list[str]) -> pa.Table:
        """Copy the columns, a few rows at a time, to a file that can be mapped; once for each state of the table."""
        status = self.path.stat()
        state = repr((str(self.path.resolve()), status.st_size, status.st_mtime_ns, columns))
        target = cache_folder() / "parquet" / f"{hashlib.sha256(state.encode()).hexdigest()[:16]}.arrow"
        if not target.exists():
            schema = pa.schema([self._file.schema_arrow.field(name) for name in columns])
            with written_beside(target) as beside, pa.ipc.new_file(str(beside), schema) as writer:
                for batch in self._file.iter_batches(256, columns=columns):
                    writer.write_batch(batch.select(columns))
        return pa.ipc.open_file(pa.memory_map(str(target))).read_all()

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
