"""Rows of JSONL, CSV and TSV files: the wanted cells as text, or the fault of the row."""

import csv
import json
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa

from declip.data.images.decode import EXTENSIONS
from declip.data.pair import BrokenPair, as_texts, is_unicode
from declip.data.sources.rows import NOT_UTF8, TableRows, cell_name
from declip.errors import UserError

LONGEST_ROW = 16 << 20  # characters. A longer row means a lost quote or line end.
ROWS_AT_ONCE = 1 << 12  # rows that are collected before they are written
PEEKED_ROWS = 100  # rows of a JSONL file read to learn its columns, since no header lists them


class TextRows(TableRows):
    """A UTF-8 file of rows that start on separate lines; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            start = file.read(LONGEST_ROW)
        if not start:
            raise UserError(f"The table '{path}' has no rows. It needs one for each pair.")
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"The table '{path}' is UTF-16. Save it as UTF-8.")
        if b"\r" in start and b"\n" not in start:
            raise UserError(f"The table '{path}' has lines that end with CR alone: tr '\\r' '\\n' < OLD > NEW.")

    @abstractmethod
    def parse(self, row: str) -> dict[str, Any]:
        """The cells of a row by column; raises ValueError or RecursionError."""

    def complete(self, line: str, lines: Iterator[str], number: int) -> str:
        """The complete row that starts with a line; the next lines may belong to it."""
        return line

    def rows(self) -> Iterator[tuple[int, str]]:
        """The number of the first line of each row, and the row."""
        number = 1
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            lines = _lines(file)
            for line in lines:
                row = line if len(line) > LONGEST_ROW else self.complete(line, lines, number)
                if row.strip():
                    yield number, row
                number += max(1, row.count("\n"))

    def cells(self, row: str, key: str) -> dict[str, Any]:
        """The cells of a row by column; raises `BrokenPair`."""
        if len(row) > LONGEST_ROW:
            raise BrokenPair("unreadable row", key, f"more than {LONGEST_ROW:,} characters long")
        if not row.isascii() and not is_unicode(row):
            raise BrokenPair("invalid text", key, NOT_UTF8)
        try:
            return self.parse(row.removeprefix("\ufeff"))  # of a file that was appended
        except (ValueError, RecursionError) as error:
            raise BrokenPair("unreadable row", key, str(error)) from error

    def read(self, wanted: Sequence[str], captions: str | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        text, texts = pa.large_string(), pa.list_(pa.large_string())
        cells = [(name, texts if name == captions else text) for name in wanted]
        schema = pa.schema([*cells, ("line", pa.int64()), ("fault", text)])

        def batches() -> Iterator[pa.RecordBatch]:
            stamp, rows = self.path.stat().st_mtime_ns, self.rows()
            while part := [self._stored(*row, wanted, captions) for row in islice(rows, ROWS_AT_ONCE)]:
                yield pa.record_batch([*zip(*part, strict=True)], schema=schema)
            if self.path.stat().st_mtime_ns != stamp:
                raise UserError(f"The table '{self.path}' was rewritten while it was read. Try again.")

        return schema, batches()

    def _stored(self, line: int, row: str, wanted: Sequence[str], captions: str | None) -> tuple[Any, ...]:
        """The wanted cells, the line's number, and no fault; or no cells and a fault."""
        key = f"line {line}"
        kept: list[Any] = []
        try:
            cells = self.cells(row, key)
            for name in wanted:
                cell = cells.get(name)
                if name == captions:
                    kept.append([cell] if isinstance(cell, str) else as_texts(cell, "unreadable row", key))
                else:
                    kept.append(cell if isinstance(cell, str) else cell_name(cell))
            # JSON may escape half of a character, which no file can hold as UTF-8.
            if "\\u" in row and not is_unicode(json.dumps(kept, ensure_ascii=False)):
                raise BrokenPair("invalid text", key, "half of a character that takes two code units")
        except BrokenPair as broken:
            return (*[None] * len(wanted), line, f"{broken.reason}: {broken.detail}")
        return (*kept, line, None)


def _lines(file: TextIO) -> Iterator[str]:
    """The lines of a file; the rest of one that is longer than a row is skipped."""
    while line := file.readline(LONGEST_ROW + 1):
        part = line
        while part and not part.endswith("\n"):
            part = file.readline(LONGEST_ROW)
        yield line


class JsonRows(TextRows):
    """A file with a JSON object per line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        columns: dict[str, None] = {}
        fault: BrokenPair | None = None
        first = ""
        for line, row in islice(self.rows(), PEEKED_ROWS):
            first = first or row.lstrip()
            try:
                columns.update(dict.fromkeys(self.cells(row, f"line {line}")))
            except BrokenPair as broken:
                fault = fault or broken
        if fault and (not columns or first.startswith("[")):
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
    """A CSV or TSV file whose first line names the columns; in CSV quotes may enclose line ends.

    A CSV file whose first line has no comma may be separated by semicolons or tabs. A quotation mark that would swallow
    rows is an error in CSV. A row of TSV, often written without quotes, is one line, and read literally if its marks
    break the rules.
    """

    columns: Sequence[str] = ()

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self.delimiter = delimiter
        header = next(super().rows(), (1, ""))[1]
        if delimiter == "," and "," not in header:
            self.delimiter = next((sign for sign in ";\t" if sign in header), ",")
        self.columns = self._split(header)

    def rows(self) -> Iterator[tuple[int, str]]:
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

    def complete(self, line: str, lines: Iterator[str], number: int) -> str:
        if '"' not in line or self.delimiter == "\t":
            return line
        taken: list[str] = []

        def parts() -> Iterator[str]:
            room = LONGEST_ROW
            for part in chain([line], lines):
                taken.append(part)
                yield part
                room -= len(part)
                if room < 0:
                    return

        try:
            next(csv.reader(parts(), delimiter=self.delimiter, strict=True))
            lost = len(taken) > 1 and self._swallows(taken)
        except csv.Error as error:  # in a line alone it is read as spreadsheets do
            lost = len(taken) > 1 or "end of data" in str(error)
        if lost:
            raise UserError(
                f"'{self.path}' has a quotation mark in line {number} that is never closed, or only in another row, so "
                'that rows would be lost. A cell that begins with " also ends with it, and has each " of its text '
                "twice; csv.writer of Python and spreadsheets write it so."
            )
        return "".join(taken)

    def _swallows(self, lines: list[str]) -> bool:
        """Whether a row of several lines seems to contain rows: two lines have enough cells, one of them an image."""
        rows = [line.split(self.delimiter) for line in lines]
        rows = [cells for cells in rows if len(cells) >= len(self.columns)]
        return sum(any(cell.strip('" \r\n').lower().endswith(EXTENSIONS) for cell in cells) for cells in rows) > 1
