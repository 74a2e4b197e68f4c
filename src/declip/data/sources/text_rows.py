"""Rows of JSONL, CSV and TSV files, of which only the positions in the file are stored."""

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

from declip.data.images.decode import EXTENSIONS
from declip.data.pair import BrokenPair
from declip.data.sources.open_file import OpenFile
from declip.data.sources.rows import TableRow, TableRows, combined, not_utf8
from declip.errors import UserError

LONGEST_ROW = 16 << 20  # bytes. A longer row means a lost quote or line end.
ROWS_AT_ONCE = 1 << 16  # rows whose places are collected before they are written
PEEKED_ROWS = 100  # rows of a JSONL file read to learn its columns, since no header lists them

Place = tuple[int, int, int, bytes]
"""The start and size of a row in bytes, the number of its first line, and its content up to the longest row."""


class TextRows(TableRows):
    """A UTF-8 file of rows that start on separate lines; blank lines are skipped."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file = OpenFile(path)
        self._stamp = self._file.stamp
        start = self._file.read(LONGEST_ROW, 0)
        if not start:
            raise UserError(f"The table '{path}' has no rows. It needs one for each pair.")
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise UserError(f"The table '{path}' is UTF-16. Save it as UTF-8.")
        if b"\r" in start and b"\n" not in start:
            raise UserError(f"The table '{path}' has lines that end with CR alone: tr '\\r' '\\n' < OLD > NEW.")

    @abstractmethod
    def parse(self, row: str) -> dict[str, Any]:
        """The cells of a row by column; raises ValueError or RecursionError."""

    def complete(self, line: bytes, file: BinaryIO, number: int) -> bytes:
        """The complete row that starts with a line; `file` is at the next line."""
        return line

    def places(self) -> Iterator[Place]:
        """Find the rows."""
        start, number = 0, 1
        with self.path.open("rb") as file:
            while line := file.readline(LONGEST_ROW + 1):
                row = line if len(line) > LONGEST_ROW else self.complete(line, file, number)
                size, part = len(row), row
                while part and not part.endswith(b"\n"):
                    part = file.readline(LONGEST_ROW)
                    size += len(part)
                if row.strip():
                    yield start, size, number, row
                start, number = start + size, number + max(1, row.count(b"\n"))

    def schema(self) -> pa.Schema:
        kinds = {"image": pa.large_binary(), **dict.fromkeys(("start", "size", "line"), pa.int64())}
        return pa.schema(kinds | ({"split": pa.string()} if self.split else {}))

    def batches(self) -> Iterator[pa.RecordBatch]:
        places = self.places()
        while part := list(islice(places, ROWS_AT_ONCE)):
            starts, sizes, lines, rows = zip(*part, strict=True)
            images, splits = zip(*map(self._image_and_split, rows, lines), strict=True)
            arrays = [pa.array(images, pa.large_binary()), starts, sizes, lines]
            yield pa.record_batch([*arrays, splits][: len(self.schema())], schema=self.schema())
        self._read(0, 0)  # the rows were found in one state of the file

    def _image_and_split(self, row: bytes, line: int) -> tuple[bytes, str | None]:
        """The cells of a row by which pairs are grouped and split; the split of an unreadable row is None."""
        try:
            cells = self._cells(row, line)
        except BrokenPair:
            return b"", None
        image, split = cells.get(self.image), str(cells.get(self.split or "") or "")
        return image.encode(errors="surrogatepass") if isinstance(image, str) else b"", split

    def split_cells(self) -> pa.ChunkedArray | None:
        return self.table["split"] if self.split else None

    def _read(self, size: int, at: int) -> bytes:
        """Read bytes; raises `UserError` if the file has changed since it was opened."""
        content = self._file.read(size, at)
        if len(content) < size or self._file.stamp != self._stamp:
            raise UserError(
                f"The table '{self.path}' was rewritten while it was read: it had {self._stamp[0]:,} bytes, now "
                f"{self._file.size:,}, so its rows can no longer be found. Restore it and continue with --resume, and "
                "write the new table to another file."
            )
        return content

    def image_keys(self, hashed: bool) -> pa.LargeBinaryArray:
        return combined(self.table.column(0))

    def pair(self, numbers: list[int]) -> TableRow:
        rows = []
        for number in numbers:
            start, size, line = (column[number].as_py() for column in self.table.columns[1:4])
            rows.append(self._cells(self._read(min(size, LONGEST_ROW + 1), start), line))
        image = rows[0].get(self.image)
        key = image if image and isinstance(image, str) else f"line {self.table['line'][numbers[0]]}"
        keywords = [row.get(self.keywords) for row in rows] if self.keywords else []
        group = rows[0].get(self.group) if self.group else None
        return TableRow(key, image, [row.get(self.caption) for row in rows], keywords, group)

    def _cells(self, row: bytes, line: int) -> dict[str, Any]:
        key = f"line {line}"
        if len(row) > LONGEST_ROW:
            raise BrokenPair("unreadable row", key, f"more than {LONGEST_ROW:,} bytes long")
        try:
            return self.parse(row.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise not_utf8(key, error) from error
        except (ValueError, RecursionError) as error:
            raise BrokenPair("unreadable row", key, str(error)) from error


class JsonRows(TextRows):
    """A file with a JSON object per line."""

    sampled = True

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        columns: dict[str, None] = {}
        fault: BrokenPair | None = None
        for _, _, line, row in islice(self.places(), PEEKED_ROWS):
            try:
                columns.update(dict.fromkeys(self._cells(row, line)))
            except BrokenPair as broken:
                fault = fault or broken
        if fault and (not columns or self._read(min(99, self._stamp[0]), 0).lstrip().startswith(b"[")):
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
        header = next(super().places(), (0, 0, 1, b""))[3]
        if delimiter == "," and b"," not in header:
            self.delimiter = next((sign for sign in ";\t" if sign.encode() in header), ",")
        self.columns = self._split(header.decode("utf-8-sig", errors="replace"))

    def places(self) -> Iterator[Place]:
        return islice(super().places(), 1, None)

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
        file.seek(after)
        return line

    def _swallows(self, lines: list[bytes]) -> bool:
        """Whether a row of several lines seems to contain rows: two lines have enough cells, one of them an image."""
        rows = [line.decode("latin-1").split(self.delimiter) for line in lines]
        rows = [cells for cells in rows if len(cells) >= len(self.columns)]
        return sum(any(cell.strip('" \r\n').lower().endswith(EXTENSIONS) for cell in cells) for cells in rows) > 1
