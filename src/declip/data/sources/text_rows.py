"""Rows of JSONL, CSV and TSV files: every cell as text, or the fault of the row."""

import csv
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc

from declip.data.images.decode import EXTENSIONS
from declip.data.pair import BrokenPair, is_unicode
from declip.data.sources.rows import TableRows, combined, not_utf8
from declip.errors import UserError

LONGEST_ROW = 16 << 20  # bytes. A longer row means a lost quote or line end.
ROWS_AT_ONCE = 1 << 12  # rows that are collected before they are written
PEEKED_ROWS = 100  # rows of a JSONL file read to learn its columns, since no header lists them

# Begins a stored cell that is JSON: a number, a list, or a text that is not Unicode.
JSON = "\0"


class TextRows(TableRows):
    """A UTF-8 file of rows that start on separate lines; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            self.start = file.read(LONGEST_ROW)
        if not self.start:
            raise UserError(f"The table '{path}' has no rows. It needs one for each pair.")
        if self.start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"The table '{path}' is UTF-16. Save it as UTF-8.")
        if b"\r" in self.start and b"\n" not in self.start:
            raise UserError(f"The table '{path}' has lines that end with CR alone: tr '\\r' '\\n' < OLD > NEW.")
        self.start = self.start[:99]

    @abstractmethod
    def parse(self, row: str) -> dict[str, Any]:
        """The cells of a row by column; raises ValueError or RecursionError."""

    def complete(self, line: bytes, file: BinaryIO, number: int) -> bytes:
        """The complete row that starts with a line; `file` is at the next line."""
        return line

    def rows(self) -> Iterator[tuple[int, bytes]]:
        """The number of the first line of each row, and its content up to the longest row."""
        number = 1
        with self.path.open("rb") as file:
            while line := file.readline(LONGEST_ROW + 1):
                row = part = line if len(line) > LONGEST_ROW else self.complete(line, file, number)
                while part and not part.endswith(b"\n"):
                    part = file.readline(LONGEST_ROW)
                if row.strip():
                    yield number, row
                number += max(1, row.count(b"\n"))

    def cells(self, row: bytes, key: str) -> dict[str, Any]:
        """The cells of a row by column; raises `BrokenPair`."""
        if len(row) > LONGEST_ROW:
            raise BrokenPair("unreadable row", key, f"more than {LONGEST_ROW:,} bytes long")
        try:
            return self.parse(row.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise not_utf8(key, error) from error
        except (ValueError, RecursionError) as error:
            raise BrokenPair("unreadable row", key, str(error)) from error

    def schema(self) -> pa.Schema:
        """The columns, the number of a row's line, and its fault."""
        cells = [(name, pa.large_string()) for name in self.wanted]
        return pa.schema([*cells, ("line", pa.int64()), ("fault", pa.large_string())])

    def batches(self) -> Iterator[pa.RecordBatch]:
        stamp, rows, schema = self.path.stat().st_mtime_ns, self.rows(), self.schema()
        while part := [self._stored(*row) for row in islice(rows, ROWS_AT_ONCE)]:
            yield pa.record_batch([*zip(*part, strict=True)], schema=schema)
        if self.path.stat().st_mtime_ns != stamp:
            raise UserError(f"The table '{self.path}' was rewritten while it was read. Try again.")

    def _stored(self, line: int, row: bytes) -> tuple[str | int | None, ...]:
        try:
            cells = self.cells(row, f"line {line}")
        except BrokenPair as broken:
            return (*[None] * len(self.wanted), line, f"{broken.reason}: {broken.detail}")
        return (*(stored(cells.get(name)) for name in self.wanted), line, None)

    def place(self, number: int) -> str:
        line, fault = (column[number].as_py() for column in self.table.columns[-2:])
        if fault is not None:
            reason, _, detail = fault.partition(": ")
            raise BrokenPair(reason, f"line {line}", detail)
        return f"line {line}"

    def value(self, cell: pa.Scalar, key: str) -> Any:
        text = cell.as_py()
        return json.loads(text[1:]) if text and text.startswith(JSON) else text

    def split_cells(self, cells: pa.ChunkedArray) -> pa.ChunkedArray:
        return pc.if_else(self.table.columns[-1].is_null(), cells.fill_null(""), pa.scalar(None, cells.type))

    def image_keys(self, hashed: bool) -> pa.LargeBinaryArray:
        cells = self.table.column(0).fill_null("")
        return combined(pc.if_else(pc.starts_with(cells, JSON), "", cells).cast(pa.large_binary()))


def stored(cell: Any) -> str | None:
    """A cell as it is stored, see `JSON`."""
    plain = isinstance(cell, str) and is_unicode(cell) and not cell.startswith(JSON)
    return cell if cell is None or plain else JSON + json.dumps(cell)


class JsonRows(TextRows):
    """A file with a JSON object per line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        columns: dict[str, None] = {}
        fault: BrokenPair | None = None
        for line, row in islice(self.rows(), PEEKED_ROWS):
            try:
                columns.update(dict.fromkeys(self.cells(row, f"line {line}")))
            except BrokenPair as broken:
                fault = fault or broken
        if fault and (not columns or self.start.lstrip().startswith(b"[")):
            raise UserError(
                f"'{path}' is not JSONL, a JSON object on each line: {fault}. To convert one JSON array: "
                f"jq -c '.[]' {path.name} > rows.jsonl"
            )
        self.columns = list(columns)

    def parse(self, row: str) -> dict[str, Any]:
        cells = json.loads(row)
        if not isinstance(cells, dict):
            raise ValueError("not a JSON object")
        return cells


class DelimitedRows(TextRows):
    """A CSV or TSV file whose first line names the columns; quotes may enclose line ends, as spreadsheets export them.

    A CSV file whose first line has no comma may be separated by semicolons or tabs. A quotation mark that would swallow
    rows is an error in CSV. In TSV, often written without quotes, a line with marks that break the rules is read
    literally.
    """

    columns: Sequence[str] = ()

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self.delimiter = delimiter
        header = next(super().rows(), (1, b""))[1]
        if delimiter == "," and b"," not in header:
            self.delimiter = next((sign for sign in ";\t" if sign.encode() in header), ",")
        self.columns = self._split(header.decode("utf-8-sig", errors="replace"))

    def rows(self) -> Iterator[tuple[int, bytes]]:
        return islice(super().rows(), 1, None)

    def parse(self, row: str) -> dict[str, Any]:
        cells = self._split(row)
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells instead of {len(self.columns)}")
        return dict(zip(self.columns, cells, strict=True))

    def _split(self, row: str) -> list[str]:
        """The cells of a row; invalid quotes are read as spreadsheets do, and literally in TSV."""
        for strict in (True, False) if self.delimiter != "\t" else (True,):
            if '"' in row:
                with suppress(csv.Error):
                    return next(csv.reader([row], delimiter=self.delimiter, strict=strict))
        return row.rstrip("\r\n").split(self.delimiter)

    def complete(self, line: bytes, file: BinaryIO, number: int) -> bytes:
        if b'"' not in line:
            return line
        after, taken = file.tell(), [line]

        def lines() -> Iterator[str]:
            yield line.decode("latin-1")  # holds any bytes
            for part in iter(partial(file.readline, LONGEST_ROW), b""):
                taken.append(part)
                yield part.decode("latin-1")
                if file.tell() - after > LONGEST_ROW:
                    return

        # --- as many lines as the quotes enclose, unless these look like rows
        with suppress(csv.Error):
            next(csv.reader(lines(), delimiter=self.delimiter, strict=True))
            if len(taken) == 1 or not self._swallows(taken):
                return b"".join(taken)
        if self.delimiter != "\t" and (len(taken) > 1 or self._split(line.decode("latin-1") + "\n")[-1].endswith("\n")):
            raise UserError(
                f"'{self.path}' has a quotation mark in line {number} that is never closed, or only in another row, so "
                'that rows would be lost. A cell that begins with " also ends with it, and has each " of its text '
                "twice; csv.writer of Python and spreadsheets write it so."
            )
        # --- in TSV such marks are text
        file.seek(after)
        return line

    def _swallows(self, lines: list[bytes]) -> bool:
        """Whether a row of several lines seems to contain rows: two lines have enough cells, one of them an image."""
        rows = [line.decode("latin-1").split(self.delimiter) for line in lines]
        rows = [cells for cells in rows if len(cells) >= len(self.columns)]
        return sum(any(cell.strip('" \r\n').lower().endswith(EXTENSIONS) for cell in cells) for cells in rows) > 1
