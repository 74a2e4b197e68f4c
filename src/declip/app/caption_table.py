"""The table of captions that the app writes: it changes the lines of its own rows, and all other bytes stay."""

import csv
import io
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException

from declip.app.requests import ImageId, OneLine, Text
from declip.data.pair import BrokenPair, is_unicode, on_one_line
from declip.data.sources.names import resolve
from declip.data.sources.rows import NOT_UTF8, DelimitedRows
from declip.errors import UserError
from declip.io.atomic import atomic_write, csv_path, flush, locked_for
from declip.search.choose import check_files, image_cell
from declip.search.index import Index

HINT = "choose another file with --caption"
IMAGE, CAPTION = "image", "caption"  # columns
LONGEST_WAIT = 30  # seconds for which another process may hold the lock


Cells = dict[str, str]  # by column


class Row(NamedTuple):
    """The lines of a row in the file, and its cells."""

    span: slice
    cells: Cells

    @property
    def caption(self) -> str:
        """The caption in one line; may be empty."""
        return on_one_line(self.cells[CAPTION])


class CaptionFile(NamedTuple):
    """A table of captions as it is on the disk."""

    stamp: tuple[int, ...] | None  # None without a file
    lines: list[bytes]
    columns: Sequence[str]
    delimiter: str
    rows: list[Row]

    @classmethod
    def read(cls, path: Path) -> "CaptionFile":
        """Read a table; raises `UserError` for a row that training would leave out."""
        try:
            stamp = _stamp(path)
            if not stamp or not stamp[0]:
                return cls(stamp, [b"image,caption\r\n"], (IMAGE, CAPTION), ",", [])
            table = DelimitedRows(path, ",")
            records = [*table.records()]
            with path.open("rb") as file:
                lines = [*file]
        except OSError as error:
            raise UserError(
                f"'{path}' cannot be read: {error.strerror}. Fix that or {HINT}."
            ) from error
        if _stamp(path) != stamp:
            raise UserError(f"'{path}' changes while it is read. Try again, or {HINT}.")
        # --- what training would leave out is refused
        columns = [*table.columns]
        if (columns.count(IMAGE), columns.count(CAPTION)) != (1, 1):
            raise UserError(
                f"'{path}' needs one column image and one column caption. Add them, or {HINT}."
            )
        rows = []
        starts = [number - 1 for number, _ in records]
        ends = [*starts, len(lines)][1:]
        for (number, cells), end in zip(records, ends, strict=True):
            fault = None
            if isinstance(cells, BrokenPair):
                fault = cells.detail
            if isinstance(cells, BrokenPair) or not all(map(is_unicode, cells.values())):
                remedy = f"Fix the line (a text with commas needs quotation marks), or {HINT}."
                raise UserError(
                    f"Line {number} of '{path}' is not a row of the table: {fault or NOT_UTF8}. {remedy}"
                )
            while not lines[end - 1].strip():  # blank lines after the row
                end -= 1
            rows.append(Row(slice(number - 1, end), cells))
        return cls(stamp, lines, table.columns, table.delimiter, rows)

    def with_captions(
        self, rows: Sequence[Row], captions: Sequence[str], new: Sequence[Cells]
    ) -> bytes:
        """The content of the file with the captions in some rows, rising, and with new rows at its end."""
        lines = [*self.lines]
        changed = [*zip(rows, captions, strict=False)]
        for (span, cells), text in reversed(changed):
            lines[span] = [self._encode({**cells, CAPTION: text})]
        if not lines[-1].endswith(b"\n"):
            lines.append(self._line_end)
        return b"".join([*lines, *map(self._encode, new)])

    @property
    def _line_end(self) -> bytes:
        if self.lines[0].endswith(b"\r\n"):
            return b"\r\n"
        return b"\n"

    def _encode(self, cells: Cells) -> bytes:
        line = io.StringIO()
        form: Any = {"delimiter": self.delimiter, "lineterminator": self._line_end.decode()}
        writer = csv.DictWriter(line, self.columns, restval="", **form)
        writer.writerow(cells)
        return line.getvalue().encode()


@contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Lock a table, and yield its path without links, which have the same lock as their target."""
    target = Path(os.path.realpath(path))
    # Not in the cache: processes of other users, containers and machines know this file and no other.
    with locked_for(path, target.with_name(f".{target.name}.lock"), HINT, LONGEST_WAIT):
        yield target


def check_table(path: Path) -> None:
    """Raise a `UserError` if captions cannot be saved in a file."""
    with locked(csv_path(path, "--caption")):
        CaptionFile.read(path)


class Change(BaseModel):
    """New captions of an image, and those that the page showed as saved; `replaces` is the number of one of them."""

    id: ImageId
    captions: Annotated[list[Text], Field(max_length=50)]
    seen: list[Annotated[str, OneLine]]
    replaces: int | None = Field(None, ge=0)


class CaptionTable:
    """The captions of an index's images in a .csv file, which is read again before each change."""

    def __init__(self, path: Path, index: Index) -> None:
        check_table(path)
        self.path = csv_path(path, "--caption")
        self.index = index
        check_files(index)
        paths = (resolve(one, index.folder) for one in index.paths())
        self._ids = dict(zip(paths, index.ids.tolist(), strict=True))

    def read(self) -> dict[int, list[str]]:
        """The captions of each image of the index, in the order of the file."""
        captions: dict[int, list[str]] = {}
        with locked(self.path) as target:
            file = CaptionFile.read(target)
        for id, row in self._known(file):
            if row.caption:
                captions.setdefault(id, []).append(row.caption)
        return captions

    def change(self, change: Change) -> None:
        """Write a change to the disk; raises a 409 if the file has other captions of the image than were seen."""
        with locked(self.path) as target:
            file = CaptionFile.read(self.path)
            content = self._apply(file, change)
            with atomic_write(target, HINT, durable=True) as partial:
                partial.write_bytes(content)
                flush(partial)
                # Editors and programs that synchronize files do not know the lock.
                if _stamp(target) != file.stamp:
                    raise UserError(
                        f"Not saved: another program is writing to '{target}'. Save again, or {HINT}."
                    )

    def _apply(self, file: CaptionFile, change: Change) -> bytes:
        own = [row for owner, row in self._known(file) if owner == change.id]
        captioned = [row for row in own if row.caption]
        empty = [row for row in own if not row.caption]
        known = [row.caption for row in captioned]
        if known != change.seen:
            now = "; ".join(known) or "none"
            raise HTTPException(
                409, f"Not saved: this image has other captions now ({now}). Save again."
            )
        if change.replaces is not None:
            if change.replaces >= len(known):
                raise UserError("There is no such caption.")
            row = captioned[change.replaces]
            new = ""
            if change.captions:
                new = change.captions[0]
            if new in known and new != row.caption:
                new = ""
            return file.with_captions([row], [new], [])
        # --- into rows without a caption, as `declip choose` writes them, then into new ones
        texts = [text for text in dict.fromkeys(change.captions) if text not in known]
        cell = image_cell(self.index, change.id, self.path.parent)
        new_rows = [{IMAGE: cell, CAPTION: text} for text in texts[len(empty) :]]
        return file.with_captions(empty, texts, new_rows)

    def _known(self, file: CaptionFile) -> Iterator[tuple[int, Row]]:
        """The rows of images of the index, with their ids."""
        folder = self.path.parent.absolute()
        for row in file.rows:
            path = os.path.normpath(folder / os.path.expanduser(row.cells[IMAGE]))
            id = self._ids.get(path)
            if id is not None:
                yield id, row


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Size, time and number of a file; None without one. Raises a `UserError` for pipes and devices."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(
            f"'{path}' is not a regular file, so captions cannot be saved in it; {HINT}."
        )
    return status.st_size, status.st_mtime_ns, status.st_ino
