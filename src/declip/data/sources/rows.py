"""The rows of a table as Arrow batches: of Parquet files, CSV, TSV and JSON lines."""

import csv
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from declip.data.images.decode import EXTENSIONS
from declip.data.pair import BrokenPair, as_texts, is_unicode
from declip.data.sources.names import expand, files_in
from declip.errors import UserError

# Bytes of a file (decompressed), and rows of a Parquet file, beyond which what is read is kept in a cache file.
LARGE_TABLE = 32 << 20
MANY_ROWS = 250_000
# Bytes that the columns of a Parquet file may take, and their largest ratio to the file's size beyond that.
MOST_IN_PARQUET = 1 << 30
MOST_GROWTH = 100
# Rows of a Parquet file read at a time: they may hold images, or a value that is stored once and repeated in all.
ROWS_AT_ONCE = 512
LONGEST_ROW = 16 << 20  # characters. A longer row means a lost quote or line end.
TEXT_ROWS_AT_ONCE = 1 << 12  # rows that are collected before they are written
PEEKED_ROWS = 100  # rows of a JSONL file read to learn its columns, since no header lists them

# Splits that begin the names of Parquet files, as the Hub has them: `train-00000-of-00002.parquet`.
SPLIT = re.compile("(train|val|dev|test)(?![a-z])|validation", re.IGNORECASE)
Row = dict[str, Any]  # cells by column
Readers = dict[str, Callable[[Any], Any]]  # what reads the cells of each column
Names = Collection[str]
Batches = tuple[pa.Schema, Iterator[pa.RecordBatch]]
NOT_UTF8 = "not UTF-8; if the file is Latin-1, convert it: iconv -f latin1 -t utf-8"


def by_lower_name(columns: Sequence[str]) -> dict[str, str]:
    """Columns by their names without case; the first of several."""
    return {name.strip().lower(): name for name in reversed(columns)}


def cell_name(cell: Any) -> str:
    """A cell as the text that names a split, a group, a class or a path; empty for none, for NaN, and for a list."""
    is_nan = isinstance(cell, float) and cell != cell
    if cell is None or is_nan or isinstance(cell, list | dict):
        return ""
    return str(cell)


def class_name(cell: Any, names: Sequence[str]) -> Any:
    """The name of the class that a cell numbers; other cells as they are."""
    is_number = isinstance(cell, int | np.integer) and 0 <= cell < len(names)
    if is_number:
        return names[int(cell)]
    return cell


def label_text(cell: Any) -> str:
    """A cell as a part of a caption: a text, a number, or a list of these; empty for none, for NaN and for bytes."""
    values = [cell]
    if isinstance(cell, list | tuple | np.ndarray):
        values = list(cell)
    texts = list[str]()
    for value in values:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, bytes):
            continue
        # Whole numbers of a column with empty cells are floats in pandas.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        texts.append(cell_name(value).strip())
    return ", ".join(filter(None, texts))


def label_names(rows: "TableRows", column: str) -> list[str]:
    """The names that Hugging Face's `datasets` stores for a column of class numbers; none for other files."""
    try:
        info = json.loads(rows.metadata[b"huggingface"])["info"]
        names = info["features"][column]["names"]
        return [" ".join(name.split()) for name in names]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return []


class TableRows(ABC):
    """A table's file or files, its columns, and reading some of them."""

    columns: Sequence[str]
    metadata: Mapping[bytes, bytes] = MappingProxyType({})  # of Parquet

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path.parent  # that image paths are relative to
        self.files = [path]
        # What is read goes to a cache file
        self.large = path.is_file() and path.stat().st_size > LARGE_TABLE

    @abstractmethod
    def read(self, wanted: Sequence[str], captions: Names = (), labels: Names = ()) -> Batches:
        """The rows of some columns, some of which hold captions, or labels for templates of captions.

        Text files have two more columns, the number of a row's line and its fault.
        """


class ParquetRows(TableRows):
    """A Parquet file, or several in the order of their names; images are paths, bytes, or structs of both."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if path.is_dir():
            self.files = list(map(Path, files_in(path, ".parquet")))
            begun = filter(None, [SPLIT.match(file.name) for file in self.files])
            splits = sorted({split[0].lower() for split in begun})
            if len(splits) > 1:
                one = path / f"{splits[0]}*.parquet"
                raise UserError(
                    f"'{path}' has the splits {', '.join(splits)}. Name the files of one: '{one}'."
                )
        elif not path.is_file():
            self.files = [Path(file) for file in expand(str(path))]
        if not self.files:
            raise UserError(f"'{path}' has no .parquet file. Name the files, or their folder.")
        self.folder = Path(os.path.commonpath([file.parent for file in self.files]))
        footers = list[pq.FileMetaData]()
        for file in self.files:
            if not file.is_file():  # a named pipe blocks on open
                raise UserError(f"'{file}' is not a file. Remove it, or name the Parquet files.")
            try:
                footers.append(pq.read_metadata(file))
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise UserError(
                    f"'{file}' is not a Parquet file: {str(error).rstrip('.')}."
                ) from error
        self.arrow_schema = footers[0].schema.to_arrow_schema()
        self.columns = self.arrow_schema.names
        self.metadata = self.arrow_schema.metadata or {}
        self._rows = [footer.num_rows for footer in footers]
        # Counted over all columns: asking pyarrow 26 for one column ends the process where the file is damaged.
        size = 0
        for footer in footers:
            for group in range(footer.num_row_groups):
                size += footer.row_group(group).total_byte_size
        self.large = size > LARGE_TABLE or sum(self._rows) > MANY_ROWS

    def read(self, wanted: Sequence[str], captions: Names = (), labels: Names = ()) -> Batches:
        schema = pa.schema([self.arrow_schema.field(name) for name in wanted])
        batches = map(partial(self._batches, schema), self.files, self._rows)
        return schema, chain.from_iterable(batches)

    def _batches(self, schema: pa.Schema, path: Path, count: int) -> Iterator[pa.RecordBatch]:
        """The columns of one of the files, which has `count` rows."""
        file = pq.ParquetFile(path)
        most = max(MOST_GROWTH * path.stat().st_size, MOST_IN_PARQUET)
        types = {field.name: field.type for field in file.schema_arrow}
        for field in schema:
            if types.get(field.name) != field.type:
                problem = f"'{path}' has no column '{field.name}' of the type in '{self.files[0]}'."
                raise UserError(f"{problem} Name files with other columns as another source.")
        size = rows = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=schema.names):
            size += batch.nbytes
            rows += len(batch)
            if size > most:
                raise UserError(f"'{path}' is not read: its columns take more than {most:,} bytes.")
            # Rebuilt, since fields of the same type may differ in nullability and metadata.
            arrays = batch.select(schema.names).columns
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        if rows != count:
            raise UserError(f"'{path}' cannot be read: it says {count:,} rows and has {rows:,}.")


class TextRows(TableRows):
    """A UTF-8 file of rows that start on separate lines; blank lines are skipped."""

    @abstractmethod
    def record(self, line: str, following: Iterator[str], number: int) -> Row:
        """The cells by column of the row that starts with a line; raises ValueError or RecursionError."""

    def lines(self) -> Iterator[tuple[int, str]]:
        """The lines that are not blank, with their numbers; the rest of one that is longer than a row is skipped."""
        with self.path.open(encoding="utf-8-sig", errors="surrogateescape", newline="\n") as file:
            for number in count(1):
                line = rest = file.readline(LONGEST_ROW + 1)
                while rest and not rest.endswith("\n"):
                    rest = file.readline(LONGEST_ROW)
                # A byte order mark
                if number == 1 and line.startswith(("\udcff\udcfe", "\udcfe\udcff")):
                    raise UserError(f"The table '{self.path}' is UTF-16. Save it as UTF-8.")
                if not line:
                    return
                yield number, line

    def records(self) -> Iterator[tuple[int, Row | BrokenPair]]:
        """The number of the first line of each row, and its cells or what is wrong with it."""
        lines = self.lines()
        following = (line for _, line in lines)
        for number, line in lines:
            if line.isspace():
                continue
            try:
                if len(line) > LONGEST_ROW:
                    raise ValueError(f"more than {LONGEST_ROW:,} characters long")
                # Files may have been appended to each other, marks of UTF-8 and all.
                yield number, self.record(line.removeprefix("\ufeff"), following, number)
            except UserError:  # of the table
                raise
            except (ValueError, RecursionError) as error:
                yield number, BrokenPair("unreadable row", f"line {number}", str(error))

    def read(self, wanted: Sequence[str], captions: Names = (), labels: Names = ()) -> Batches:
        text = pa.large_string()
        fields = [(name, pa.list_(text) if name in captions else text) for name in wanted]
        schema = pa.schema([*fields, ("line", pa.int64()), ("fault", text)])
        readers: Readers = dict.fromkeys(wanted, cell_name)
        readers |= dict.fromkeys(labels, label_text)
        readers |= dict.fromkeys(captions, partial(as_texts, reason="unreadable row", key=""))

        def batches() -> Iterator[pa.RecordBatch]:
            stamp = self.path.stat().st_mtime_ns
            rows_read = (_read_cells(line, cells, readers) for line, cells in self.records())
            while rows := list(islice(rows_read, TEXT_ROWS_AT_ONCE)):
                yield pa.record_batch([*zip(*rows, strict=True)], schema=schema)
            if self.path.stat().st_mtime_ns != stamp:
                raise UserError(
                    f"The table '{self.path}' was rewritten while it was read. Try again."
                )

        return schema, batches()


def _read_cells(line: int, cells: Row | BrokenPair, readers: Readers) -> tuple[Any, ...]:
    """The cells that are read, the line's number, and no fault; or no cells and a fault."""
    kept: list[Any] = []
    try:
        if isinstance(cells, BrokenPair):
            raise cells
        for name, reader in readers.items():
            cell = reader(cells.get(name))
            texts = cell if isinstance(cell, list) else [cell]
            if not all(map(is_unicode, filter(None, texts))):
                raise BrokenPair("invalid text", "", NOT_UTF8)
            kept.append(cell)
    except BrokenPair as broken:
        return (*[None] * len(readers), line, f"{broken.reason}: {broken.detail}")
    return (*kept, line, None)


class JsonRows(TextRows):
    """A file with a JSON object per line."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        rows = [cells for _, cells in islice(self.records(), PEEKED_ROWS)]
        faults = [cells for cells in rows if isinstance(cells, BrokenPair)]
        objects = [cells for cells in rows if isinstance(cells, dict)]
        self.columns = list(dict.fromkeys(chain.from_iterable(objects)))
        _, first = next(self.lines(), (1, ""))
        if faults and (not self.columns or first.lstrip().startswith("[")):
            raise UserError(
                f"'{path}' is not JSONL: {faults[0]}. Convert an array: jq -c '.[]' {path.name} > a.jsonl"
            )

    def record(self, line: str, following: Iterator[str], number: int) -> Row:
        cells = json.loads(line)
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
        lines = ((number, line) for number, line in self.lines() if not line.isspace())
        number, header = next(lines, (1, ""))
        if delimiter == "," and "," not in header:
            self.delimiter = next((sign for sign in ";\t" if sign in header), ",")
        self.columns = self._cells(header, (line for _, line in lines), number)

    def records(self) -> Iterator[tuple[int, Row | BrokenPair]]:
        return islice(super().records(), 1, None)

    def record(self, line: str, following: Iterator[str], number: int) -> Row:
        cells = self._cells(line, following, number)
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} cells instead of {len(self.columns)}")
        return dict(zip(self.columns, cells, strict=True))

    def _cells(self, line: str, following: Iterator[str], number: int) -> list[str]:
        """The cells of the row that starts with a line; raises `UserError` if its quotes would swallow others."""
        literal = line.rstrip("\r\n").split(self.delimiter)
        if '"' not in line:
            return literal
        if self.delimiter == "\t":  # a row is one line
            return self._parse_line(line, strict=True) or literal
        lines = [line]  # that the row takes

        def take(another: str) -> str:
            lines.append(another)
            return another

        parts = chain([line], map(take, following))
        try:
            cells = next(csv.reader(parts, delimiter=self.delimiter, strict=True))
            lost = self._swallows(lines)
        except csv.Error as error:  # a quotation mark inside a cell, or one that is not closed
            cells = self._parse_line(line, strict=False) or literal  # as spreadsheets read it
            lost = len(lines) > 1 or "end of data" in str(error)
        if lost:
            problem = (
                f"'{self.path}' has a quotation mark in line {number} that is not closed in its row"
            )
            raise UserError(
                f'{problem}, so that rows would be lost. Close it, or write each " of a text twice.'
            )
        return cells

    def _parse_line(self, line: str, strict: bool) -> list[str]:
        """The cells of one line by the rules of quotation marks; none if it breaks them."""
        with suppress(csv.Error):
            return next(csv.reader([line], delimiter=self.delimiter, strict=strict))
        return []

    def _swallows(self, lines: list[str]) -> bool:
        """Whether a row of several lines seems to contain rows: two lines have enough cells, one of them an image."""
        with_image = 0
        for line in lines:
            cells = [cell.strip('" \r\n').lower() for cell in line.split(self.delimiter)]
            if len(cells) >= len(self.columns):
                with_image += any(cell.endswith(EXTENSIONS) for cell in cells)
        return with_image > 1
