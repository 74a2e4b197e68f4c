"""Rows of CSV and TSV tables, kept as columns, and what their quotation marks mean."""

import csv
import json
import mmap
import re
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv

from declip.data.images.decode import EXTENSIONS
from declip.data.pair import BrokenPair
from declip.data.sources import rows as table_rows
from declip.data.sources.rows import Row, group_rows, text_of, whole, write_mapped
from declip.errors import UserError
from declip.io.memo import cached_table

DAMAGED = b"damaged"
"""Under this name a table's metadata keeps the rows that were left out."""

ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)


class Delimited:
    """A CSV or TSV file; quotes as in a spreadsheet's export, line ends inside quotes allowed.

    A quotation mark that would swallow rows is an error in CSV. In TSV, which is often written without quotes, a cell
    that begins with a mark and does not follow their rules is read as it stands.

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
        if self.path.stat().st_size <= table_rows.LARGE_TEXT:
            table = self._read(image, caption)
        else:
            made_of = (2, self.delimiter, image, caption)
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
        requoted = check_quotes(self.path, self.delimiter.encode(), len(self.columns))
        try:
            table = pacsv.read_csv(
                self.path if requoted is None else pa.BufferReader(requoted),
                pacsv.ReadOptions(use_threads=False, block_size=table_rows.LONGEST_ROW),
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

    def row(self, index: int) -> Row:
        """Read a pair; its key is the image's path, else the row's number, the header being row 1.

        Raises:
            BrokenPair: The row was damaged.
        """
        if index >= len(self._row):
            number, detail = self._damaged[index - len(self._row)]
            raise BrokenPair("unreadable row", f"row {number}", detail)
        image = self._images[index].as_py()
        key = image.decode(errors="replace") or f"row {self._row[index].as_py() + 2}"
        return Row(
            key,
            lambda: text_of(image, key),
            lambda: [text_of(caption, key) for caption in self._captions[index].as_py()],
        )


def check_quotes(path: Path, delimiter: bytes, columns: int) -> bytearray | None:
    """Check that no cell which begins with a quotation mark swallows rows.

    Args:
        path: A CSV or TSV file that is not empty.
        delimiter: One byte.
        columns: How many the header names.

    Returns:
        The whole file with its literal cells quoted, where a TSV has such cells; else None.

    Raises:
        UserError: In a CSV, a mark is never closed, or only in another row; its place is named.
    """
    ends = b"[\r\n%s]" % re.escape(delimiter)
    # Most of a file is passed in one call: text, marks inside unquoted cells, and quoted cells of one line.
    inside, simple = rb"(?<!\xef\xbb\xbf)(?<=[^\r\n%s])\"" % delimiter, rb"\"(?:[^\"\r\n]++|\"\")*+\"(?=%s|\Z)" % ends
    passed = re.compile(rb"(?:[^\"]++|%s|%s)*+" % (inside, simple))
    quoted, end = re.compile(rb"\"(?:[^\"]++|\"\")*+\""), re.compile(rb"%s|\Z" % ends)
    requoted, copied, inner_lines, at = bytearray(), 0, 0, 0
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while (at := _end(passed.match(data, at))) < len(data):
            closed = quoted.match(data, at, at + table_rows.LONGEST_ROW)
            stop = _end(closed) if closed else 0
            lines = data[at:stop].count(b"\n")
            whole_cell = bool(closed) and end.match(data, stop) is not None
            if lines and whole_cell and not _swallows(data, at, stop, delimiter, columns):
                inner_lines, at = inner_lines + lines, stop
            elif delimiter == b"\t":
                stop = _end(end.search(data, at), start=True)
                if stop - at > table_rows.LONGEST_ROW:
                    raise UserError(f"'{path}' cannot be read as a table: it has a cell of {stop - at:,} bytes.")
                requoted += data[copied:at] + b'"' + data[at:stop].replace(b'"', b'""') + b'"'
                at = copied = stop
            elif closed and not lines:
                at = _end(end.search(data, stop), start=True)
            else:
                begin = data.rfind(b"\n", 0, at) + 1
                row = data[:at].count(b"\n") - inner_lines + 1
                character = len(data[begin:at].decode(errors="replace").lstrip("\ufeff")) + 1
                how = f"closed {lines} lines below, in another row" if closed else "never closed"
                raise UserError(
                    f"'{path}' has a quotation mark in row {row}, character {character}, that is {how}, so that rows "
                    'would be lost. A cell that begins with " also ends with it, and has each " of its text twice; '
                    "csv.writer of Python and spreadsheets write it so."
                )
        return requoted + data[copied:] if copied else None


def _end(match: re.Match[bytes] | None, start: bool = False) -> int:
    """Where a match that cannot fail ends or starts."""
    assert match is not None
    return match.start() if start else match.end()


def _swallows(data: mmap.mmap, at: int, stop: int, delimiter: bytes, columns: int) -> bool:
    """Whether a quoted cell holds what looks like rows: two of the lines that it touches have enough cells for one.

    In a CSV, whose text has commas too, one of these cells also has to name an image.
    """
    last = data.find(b"\n", stop)
    lines = data[data.rfind(b"\n", 0, at) + 1 : last if last >= 0 else len(data)].split(b"\n")
    rows = [cells for cells in (line.split(delimiter) for line in lines) if len(cells) >= columns]
    if delimiter == b",":
        rows = [cells for cells in rows if any(cell.strip(b'" \r').lower().endswith(ENDINGS) for cell in cells)]
    return len(rows) > 1
