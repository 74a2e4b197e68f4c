"""The captions of an index's images in a .csv file, which is complete on the disk after every caption."""

import csv
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from starlette.exceptions import HTTPException

from declip.data.sources.shard_files import resolve
from declip.errors import UserError
from declip.io.atomic import atomic_write, csv_path
from declip.io.cache import locked
from declip.search.choose import image_cell
from declip.search.index import Index

ELSEWHERE = "choose another file with --caption"


class CaptionTable:
    """The captions of an index's images in a .csv file, which is read again before each change.

    Columns and rows of others in the file stay as they are.
    """

    def __init__(self, path: Path, index: Index) -> None:
        self.path, self.index = csv_path(path, "--caption"), index
        image_cell(index, int(index.ids[0]), path.parent)  # refuses images without files
        paths = index.paths()
        self._ids = {resolve(one, index.folder): id for one, id in zip(paths, index.ids.tolist(), strict=True)}
        self._lock = hashlib.blake2b(os.fsencode(path.absolute()), digest_size=8).hexdigest()
        self.read()

    def read(self) -> dict[int, list[str]]:
        """The captions of each image of the index, in the order of the file."""
        found: dict[int, list[str]] = {}
        for row in self._rows()[1]:
            path = os.path.normpath(self.path.parent.absolute() / os.path.expanduser(row["image"] or ""))
            caption = " ".join((row["caption"] or "").split())
            if caption and (id := self._ids.get(path)) is not None:
                found.setdefault(id, []).append(caption)
        return found

    def add(self, id: int, captions: Sequence[str], seen: Sequence[str]) -> dict[int, list[str]]:
        """Append captions of an image; raises a 409 if the file has others than `seen` of it. Returns all captions."""
        with locked("captions", self._lock):
            known = self.read()
            if known.get(id, []) != [*seen]:
                said = "; ".join(known.get(id, [])) or "none"
                raise HTTPException(409, f"Not saved: this image has other captions now ({said}). Save again to add.")
            columns, rows = self._rows()
            cell = image_cell(self.index, id, self.path.parent)
            rows += [{"image": cell, "caption": text} for text in dict.fromkeys(captions) if text not in seen]
            with (
                atomic_write(self.path, ELSEWHERE, durable=True) as target,
                target.open("w", newline="", encoding="utf-8") as file,
            ):
                table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
                table.writeheader()
                table.writerows(rows)
            return self.read()

    def _rows(self) -> tuple[list[str], list[dict[str, str]]]:
        if not self.path.exists():
            return ["image", "caption"], []
        try:
            with self.path.open(newline="", encoding="utf-8-sig") as file:
                reader = csv.DictReader(file)
                columns, rows = list(reader.fieldnames or ()), list(reader)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"'{self.path}' cannot be read: {error}. Choose another file with --caption.") from error
        if not {"image", "caption"} <= {*columns}:
            raise UserError(f"'{self.path}' needs the columns image and caption. Choose another file with --caption.")
        return columns, rows
