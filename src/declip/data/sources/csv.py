"""Rows of CSV and TSV tables, held as columns, and the check of their quotation marks."""

import csv
import json
import mmap
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv

from declip.data.images.decode import EXTENSIONS
from declip.data.pair import BrokenPair
from declip.data.sources import rows as table_rows
from declip.data.sources.rows import TableRow, TableRows, group_rows, text_of, whole, write_mapped
from declip.errors import UserError
from declip.io.memo import cached_table

DAMAGED = b"damaged"
"""Key of the damaged rows in a table's metadata."""

ENDINGS = tuple(ending.encode() for ending in EXTENSIONS)


@dataclass(frozen=True)
class DelimitedRow(TableRow):
    """The cells of one image."""

    key: str
    path: bytes
    texts: list[bytes]
    words: list[bytes]

    def image(self) -> str:
        return text_of(self.path, self.key)

    def captions(self) -> list[str | None]:
        return [text_of(text, self.key) for text in self.texts]

    def keyword_cells(self) -> list[str]:
        return [text_of(words, self.key) for words in self.words]


class Delimited(TableRows):
    """A CSV or TSV file whose first line names the columns; quotes may enclose line ends, as spreadsheets export them.

    A quotation mark that would swallow rows is an error in CSV. In TSV, which is often written without quotes, a cell
    that begins with a mark and does not follow their rules is read literally. Rows with too few or too many cells come
    last, each a broken pair.
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
        if delimiter == "," and len(self.columns) == 1 and ";" in self.columns[0]:
            raise UserError(
                f"The cells of '{path}' are separated by semicolons. Save it with commas ('CSV UTF-8' in spreadsheets) "
                "or, as .tsv, with tabs."
            )

    def choose(self, image: str, caption: str, keywords: str | None = None) -> None:
        wanted = {"image": image, "captions": caption} | ({} if keywords is None else {"keywords": keywords})
        if self.path.stat().st_size <= table_rows.LARGE_TEXT:
            table = self._read(wanted)
        else:
            made_of = (3, self.delimiter, *wanted.values())
            table = cached_table(self.path, "csv", made_of, lambda to: write_mapped(self._read(wanted), to))
        self._row, self._images, self._captions = (whole(table[name]) for name in ("row", "image", "captions"))
        self._keywords = None if keywords is None else whole(table["keywords"])
        self._damaged: list[tuple[int, str]] = json.loads(table.schema.metadata[DAMAGED])

    def _read(self, wanted: dict[str, str]) -> pa.Table:
        """The pairs: number of the first row, the image's path, all captions and keywords; damaged rows as metadata."""
        damaged: list[tuple[int, str]] = []

        def note(row: pacsv.InvalidRow) -> str:
            damaged.append((row.number, f"{row.actual_columns} cells instead of {row.expected_columns}"))
            return "skip"

        names = list(dict.fromkeys(wanted.values()))
        requoted = check_quotes(self.path, self.delimiter.encode(), len(self.columns))
        try:
            table = pacsv.read_csv(
                self.path if requoted is None else pa.BufferReader(requoted),
                pacsv.ReadOptions(use_threads=False, block_size=table_rows.LONGEST_ROW),
                pacsv.ParseOptions(delimiter=self.delimiter, newlines_in_values=True, invalid_row_handler=note),
                # Bytes, so that a row that is not UTF-8 breaks that row and not the table.
                pacsv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.large_binary())),
            )
        except pa.ArrowInvalid as error:
            raise UserError(f"'{self.path}' cannot be read as a table: {error}.") from error
        cells = {part: table[name].combine_chunks() for part, name in wanted.items()}
        images = cells.pop("image")
        order, starts = group_rows(images)
        first = order[starts[:-1]]
        merged = {
            part: pa.LargeListArray.from_arrays(starts, column.take(pa.array(order))) for part, column in cells.items()
        }
        pairs = pa.table({"row": first, "image": images.take(pa.array(first)), **merged})
        return pairs.replace_schema_metadata({DAMAGED: json.dumps(damaged)})

    def __len__(self) -> int:
        return len(self._row) + len(self._damaged)

    def row(self, index: int) -> DelimitedRow:
        """See `TableRows`; the key is the image's path, else the row's number, the header being row 1."""
        if index >= len(self._row):
            number, detail = self._damaged[index - len(self._row)]
            raise BrokenPair("unreadable row", f"row {number}", detail)
        image = self._images[index].as_py()
        key = image.decode(errors="replace") or f"row {self._row[index].as_py() + 2}"
        words = [] if self._keywords is None else self._keywords[index].as_py()
        return DelimitedRow(key, image, self._captions[index].as_py(), words)


def check_quotes(path: Path, delimiter: bytes, columns: int) -> bytearray | None:
    """Check that no cell which begins with a quotation mark swallows rows; `columns` is the number in the header.

    Returns:
        The whole file with its literal cells quoted, where a TSV has such cells; else None.

    Raises:
        UserError: In a CSV, a mark is never closed, or only in another row; its place is named.
    """
    ends = b"[\r\n%s]" % re.escape(delimiter)
    # Most of a file is matched in one call: text, marks inside unquoted cells, and quoted cells of one line.
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
    """The end or start of a match that cannot fail."""
    assert match is not None
    return match.start() if start else match.end()


def _swallows(data: mmap.mmap, at: int, stop: int, delimiter: bytes, columns: int) -> bool:
    """Whether a quoted cell seems to hold rows: two of the lines that it touches have enough cells for a row.

    In a CSV, whose text has commas too, one of these cells also has to name an image.
    """
    last = data.find(b"\n", stop)
    lines = data[data.rfind(b"\n", 0, at) + 1 : last if last >= 0 else len(data)].split(b"\n")
    rows = [cells for cells in (line.split(delimiter) for line in lines) if len(cells) >= columns]
    if delimiter == b",":
        rows = [cells for cells in rows if any(cell.strip(b'" \r').lower().endswith(ENDINGS) for cell in cells)]
    return len(rows) > 1
