"""The table of captions that the app writes: it changes the lines of its own rows, and all other bytes stay."""

import csv
import io
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from starlette.exceptions import HTTPException

from declip.data.pair import BrokenPair, is_unicode
from declip.data.sources.names import resolve
from declip.data.sources.rows import NOT_UTF8, DelimitedRows
from declip.errors import UserError
from declip.io.atomic import atomic_write, csv_path, flush, locked_for
from declip.search.choose import image_cell
from declip.search.index import Index

ELSEWHERE = "choose another file with --caption"
IMAGE, CAPTION = "image", "caption"  # columns
LONGEST_WAIT = 30  # seconds for which another process may hold the lock
TRIES = 10  # of a change, while other programs write to the file


class _Changed(Exception):
    """The file has changed since it was read."""


class Row(NamedTuple):
    """The lines of a row in the file, and its cells by column."""

    span: slice
    cells: dict[str, str]


class CaptionFile(NamedTuple):
    """A table of captions as it is on the disk."""

    state: tuple[int, ...] | None  # None without a file
    lines: list[bytes]
    columns: Sequence[str]
    delimiter: str
    rows: list[Row]

    @classmethod
    def read(cls, path: Path) -> "CaptionFile":
        """Read a table; raises `UserError` for a row that training would leave out."""
        # --- again if another process replaces the file meanwhile
        for _ in range(TRIES):
            state = _state(path)
            if not state or not state[0]:
                return cls(state, [b"image,caption\r\n"], (IMAGE, CAPTION), ",", [])
            try:
                table = DelimitedRows(path, ",")
                records = [*table.records()]
                with path.open("rb") as file:
                    lines = [*file]
            except OSError as error:
                raise UserError(f"'{path}' cannot be read: {error.strerror}. Fix that or {ELSEWHERE}.") from error
            if _state(path) == state:
                break
        else:
            raise UserError(f"'{path}' changes while it is read. Try again, or {ELSEWHERE}.")
        # --- what training would leave out is refused
        if any(list(table.columns).count(name) != 1 for name in (IMAGE, CAPTION)):
            raise UserError(f"'{path}' needs one column image and one column caption. Add them, or {ELSEWHERE}.")
        rows = []
        ends = [*(number - 1 for number, _ in records), len(lines)][1:]
        for (number, cells), end in zip(records, ends, strict=True):
            fault = cells.detail if isinstance(cells, BrokenPair) else None
            if isinstance(cells, BrokenPair) or not all(map(is_unicode, cells.values())):
                remedy = f"Fix the line (a text with commas needs quotation marks), or {ELSEWHERE}."
                raise UserError(f"Line {number} of '{path}' is not a row of the table: {fault or NOT_UTF8}. {remedy}")
            while not lines[end - 1].strip():  # blank lines after the row
                end -= 1
            rows.append(Row(slice(number - 1, end), cells))
        return cls(state, lines, table.columns, table.delimiter, rows)

    def with_rows(self, changed: Sequence[Row], new: Sequence[dict[str, str]]) -> bytes:
        """The content of the file with other cells in some of its rows, and with new rows at its end."""
        lines = [*self.lines]
        for span, cells in sorted(changed, key=lambda row: row.span.start, reverse=True):
            lines[span] = [self._encode(cells)]
        if not lines[-1].endswith(b"\n"):
            lines.append(self._end)
        return b"".join([*lines, *map(self._encode, new)])

    @property
    def _end(self) -> bytes:
        return b"\r\n" if self.lines[0].endswith(b"\r\n") else b"\n"

    def _encode(self, cells: dict[str, str]) -> bytes:
        line = io.StringIO()
        table = csv.DictWriter(line, self.columns, "", delimiter=self.delimiter, lineterminator=self._end.decode())
        table.writerow(cells)
        return line.getvalue().encode()


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Lock a table, and yield its path without links, which have the same lock as their target."""
    target = Path(os.path.realpath(path))
    # Not in the cache: processes of other users, containers and machines know this file and no other.
    with locked_for(path, target.with_name(f".{target.name}.lock"), ELSEWHERE, LONGEST_WAIT):
        yield target


def check_table(path: Path) -> None:
    """Raise a `UserError` if captions cannot be saved in a file."""
    with locked(csv_path(path, "--caption")):
        CaptionFile.read(path)


class CaptionTable:
    """The captions of an index's images in a .csv file, which is read again before each change."""

    def __init__(self, path: Path, index: Index) -> None:
        check_table(path)
        self.path, self.index = csv_path(path, "--caption"), index
        image_cell(index, int(index.ids[0]), self.path.parent)  # refuses images without files
        paths = index.paths()
        self._ids = {resolve(one, index.folder): id for one, id in zip(paths, index.ids.tolist(), strict=True)}

    def read(self) -> dict[int, list[str]]:
        """The captions of each image of the index, in the order of the file."""
        found: dict[int, list[str]] = {}
        for id, row in self._known(CaptionFile.read(self.path)):
            if text := _caption(row):
                found.setdefault(id, []).append(text)
        return found

    def change(self, id: int, captions: Sequence[str], seen: Sequence[str], replaces: int | None = None) -> None:
        """Append captions of an image, or write the first or none in place of `seen[replaces]`.

        Raises a 409 if the file has other captions than `seen` of the image.
        """
        with locked(self.path) as target:
            for _ in range(TRIES):
                with suppress(_Changed):
                    file = CaptionFile.read(self.path)
                    content = self._changed(file, id, captions, seen, replaces)
                    with atomic_write(target, ELSEWHERE, durable=True) as partial:
                        partial.write_bytes(content)
                        flush(partial)
                        # Editors and programs that synchronize files do not know the lock.
                        if _state(target) != file.state:
                            raise _Changed
                    return
        raise UserError(f"Not saved: another program is writing to '{self.path}'. Save again, or {ELSEWHERE}.")

    def _changed(
        self, file: CaptionFile, id: int, captions: Sequence[str], seen: Sequence[str], replaces: int | None
    ) -> bytes:
        """The content of the file with the change of `change`."""
        own = [row for owner, row in self._known(file) if owner == id]
        captioned = [row for row in own if _caption(row)]
        if (known := [_caption(row) for row in captioned]) != [*seen]:
            raise HTTPException(
                409, f"Not saved: this image has other captions now ({'; '.join(known) or 'none'}). Save again."
            )
        texts = [text for text in dict.fromkeys(captions) if text not in seen]
        # --- in place of one caption
        if replaces is not None:
            if replaces >= len(seen):
                raise UserError("There is no such caption.")
            kept = seen[replaces] if [*captions] == [seen[replaces]] else ""
            row = captioned[replaces]
            return file.with_rows([row._replace(cells={**row.cells, CAPTION: texts[0] if texts else kept})], [])
        # --- into rows without a caption, as `declip choose` writes them, then into new ones
        empty = [row for row in own if not _caption(row)][: len(texts)]
        filled = [row._replace(cells={**row.cells, CAPTION: text}) for row, text in zip(empty, texts, strict=False)]
        cell = image_cell(self.index, id, self.path.parent)
        return file.with_rows(filled, [{IMAGE: cell, CAPTION: text} for text in texts[len(empty) :]])

    def _known(self, file: CaptionFile) -> Iterator[tuple[int, Row]]:
        """The rows of images of the index, with their ids."""
        for row in file.rows:
            path = os.path.normpath(self.path.parent.absolute() / os.path.expanduser(row.cells[IMAGE]))
            if (id := self._ids.get(path)) is not None:
                yield id, row


def _caption(row: Row) -> str:
    return " ".join(row.cells[CAPTION].split())


def _state(path: Path) -> tuple[int, ...] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino
