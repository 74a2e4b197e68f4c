"""Rows of CSV and TSV tables, whose quotation marks are checked: one that is never closed swallows all that follow."""

import csv
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TextIO

import pyarrow as pa

from declip.data.images.decode import EXTENSIONS
from declip.data.pair import BrokenPair
from declip.data.sources import rows as table_rows
from declip.data.sources.rows import TableRows
from declip.errors import UserError

BYTE_ORDER_MARK = "\xef\xbb\xbf"
"""As Latin-1, in which files are read: it holds any bytes, so that a row that is not UTF-8 breaks only itself."""

text_array = partial(pa.array, type=pa.large_string())


class DelimitedRows(TableRows):
    """A CSV or TSV file whose first line names the columns; quotes may enclose line ends, as spreadsheets export them.

    A quotation mark that would swallow rows is an error in CSV. In TSV, which is often written without quotes, a line
    with marks that do not follow the rules is read literally. Rows with too few or too many cells come last, each a
    broken pair.
    """

    def __init__(self, path: Path, delimiter: str) -> None:
        super().__init__(path)
        self.delimiter = delimiter
        with path.open("rb") as file:
            if file.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"The table '{path}' is UTF-16. Save it as UTF-8.")
        try:
            with self._open() as file:
                self.columns = self._header(_Lines(file))
        except csv.Error as error:
            raise UserError(f"The first line of '{path}' does not name columns: {error}.") from error
        if not self.columns:
            raise UserError(f"The table '{path}' is empty. It needs a line that names its columns and one a pair.")
        if delimiter == "," and len(self.columns) == 1 and ";" in self.columns[0]:
            raise UserError(
                f"The cells of '{path}' are separated by semicolons. Save it with commas ('CSV UTF-8' in spreadsheets) "
                "or, as .tsv, with tabs."
            )

    def schema(self) -> pa.Schema:
        more = [("row", pa.int64()), ("damage", pa.large_string())]
        return pa.schema([*((name, pa.large_string()) for name in self.wanted), *more])

    def batches(self) -> Iterator[pa.RecordBatch]:
        places = [self.columns.index(name) for name in self.wanted]
        cells: list[list[bytes]] = [[] for _ in places]
        numbers: list[int] = []
        damaged: dict[int, str] = {}
        with self._open() as file:
            lines = _Lines(file)
            self._header(lines)
            for number, row in enumerate(self._rows(lines), 2):
                if isinstance(row, list) and len(row) == len(self.columns):
                    numbers.append(number)
                    for column, place in zip(cells, places, strict=True):
                        column.append(row[place].encode("latin-1"))
                else:
                    damaged[number] = (
                        row if isinstance(row, str) else f"{len(row)} cells instead of {len(self.columns)}"
                    )
                if len(numbers) == table_rows.ROWS_AT_ONCE:
                    yield self._batch(cells, numbers)
                    cells, numbers = [[] for _ in places], []
        yield self._batch(cells, numbers)
        empty = [text_array([""] * len(damaged))] * len(places)
        faults = [pa.array(list(damaged), pa.int64()), text_array(list(damaged.values()))]
        yield pa.record_batch([*empty, *faults], schema=self.schema())

    def _batch(self, cells: list[list[bytes]], numbers: list[int]) -> pa.RecordBatch:
        columns = [pa.array(column, pa.large_binary()).view(pa.large_string()) for column in cells]
        rest = [pa.array(numbers, pa.int64()), pa.nulls(len(numbers), pa.large_string())]
        return pa.record_batch([*columns, *rest], schema=self.schema())

    def name_of(self, number: int) -> str:
        row, damage = (column[number].as_py() for column in self.table.columns[-2:])
        if damage is not None:
            raise BrokenPair("unreadable row", f"row {row}", damage)
        return f"row {row}"

    def _open(self) -> TextIO:
        return self.path.open(encoding="latin-1", newline="")

    def _header(self, lines: "_Lines") -> list[str]:
        names = next(csv.reader(lines, delimiter=self.delimiter), [])
        return [name.encode("latin-1").decode(errors="replace") for name in names]

    def _rows(self, lines: "_Lines") -> Iterator[list[str] | str]:
        """The cells of each row after the header, or its fault."""
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        for number, line in enumerate(lines.rows(), 2):
            if len(line) > table_rows.LONGEST_ROW:
                raise UserError(
                    f"'{self.path}' cannot be read as a table: row {number} has {len(line):,} bytes or more."
                )
            if '"' not in line:
                yield line.rstrip("\r\n").split(self.delimiter)
                continue
            lines.put_back()
            fault = ""
            try:
                cells = next(reader)
            except csv.Error as error:
                fault = str(error)
            if not fault and (len(lines.taken) == 1 or not self._swallows(lines.taken)):
                yield cells
            elif self.delimiter == "\t":
                lines.put_back(keep=1)
                yield line.rstrip("\r\n").split("\t")
            else:
                yield self._loose(line, number, len(lines.taken), fault)

    def _loose(self, line: str, number: int, taken: int, fault: str) -> list[str] | str:
        """A row of one line whose marks break the rules and swallow nothing, as spreadsheets read it."""
        try:
            cells = next(csv.reader([line.rstrip("\r\n") + "\n"]))
        except csv.Error:
            return fault
        if taken == 1 and not cells[-1].endswith("\n"):
            return cells
        raise UserError(
            f"'{self.path}' has a quotation mark in row {number} that is never closed, or only in another row, so that "
            'rows would be lost. A cell that begins with " also ends with it, and has each " of its text twice; '
            "csv.writer of Python and spreadsheets write it so."
        )

    def _swallows(self, lines: list[str]) -> bool:
        """Whether a row of several lines seems to hold rows: two of its lines have enough cells for one.

        In a CSV, whose text has commas too, one of these cells also has to name an image.
        """
        rows = [cells for cells in (line.split(self.delimiter) for line in lines) if len(cells) >= len(self.columns)]
        if self.delimiter == ",":
            rows = [cells for cells in rows if any(cell.strip('" \r\n').lower().endswith(EXTENSIONS) for cell in cells)]
        return len(rows) > 1


class _Lines:
    """The lines of a file, of which those of the current row can be put back."""

    def __init__(self, file: TextIO) -> None:
        self._read = partial(file.readline, table_rows.LONGEST_ROW + 1)
        self._waiting: list[str] = []  # the next one last
        self.taken: list[str] = []
        """The lines of the current row."""
        self._size = 0
        self._first = True

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._waiting.pop() if self._waiting else self._read()
        if self._first:
            line, self._first = line.removeprefix(BYTE_ORDER_MARK), False
        self.taken.append(line)
        self._size += len(line)
        if not line or self._size > 2 * table_rows.LONGEST_ROW:  # as if the file ended in the row
            raise StopIteration
        return line

    def rows(self) -> Iterator[str]:
        """The first line of each row; blank lines between rows are left out."""
        while True:
            self.taken, self._size = [], 0
            try:
                line = next(self)
            except StopIteration:
                return
            if line.strip("\r\n"):
                yield line

    def put_back(self, keep: int = 0) -> None:
        """Read the lines of the current row again, but the first `keep` of them."""
        self._waiting += reversed(self.taken[keep:])
        self.taken, self._size = self.taken[:keep], 0
