"""Pairs from a table: JSONL, CSV, TSV or Parquet, with an image path or image bytes and captions in each row."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from declip.data.columns import DEFAULT, Columns
from declip.data.images.decode import image_below
from declip.data.pair import BrokenPair, as_texts, clean_captions, printable
from declip.data.sources.entry import EntrySource
from declip.data.sources.rows import ParquetRows, TableRow, TableRows, by_lower_name, decoded, group_number
from declip.data.sources.shard_files import holds, is_url, names_shards
from declip.data.sources.text_rows import DelimitedRows, JsonRows
from declip.errors import UserError

IMAGE_NAMES = ("image", "file_name", "image_path", "filepath", "file_path", "path", "filename", "image_file", "img")
# Column names of public sets, most telling first; tried when the default column is missing.
CAPTION_NAMES = ("caption", "captions", "text", "texts", "title", "description", "sentences")

KINDS: dict[str, Callable[[Path], TableRows]] = {
    ".jsonl": JsonRows,
    ".json": JsonRows,  # the official list of YFCC15M is named so
    ".csv": partial(DelimitedRows, delimiter=","),
    ".tsv": partial(DelimitedRows, delimiter="\t"),
    ".parquet": ParquetRows,
}
TABLE_KINDS = tuple(KINDS)

SPREADSHEETS = (".xlsx", ".xls", ".xlsm", ".ods", ".numbers")

# Tables in a folder of images, as Hugging Face's ImageFolder has them: column `file_name` and any others.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


class TableSource(EntrySource):
    """Pairs from the rows of a table, see `open_source`."""

    def __init__(self, path: str | Path, columns: Columns = DEFAULT) -> None:
        self._arguments = (path, columns)
        self.rows = open_rows(path)
        path = self.rows.path
        self.name = path.name
        self.root = self.rows.folder if columns.root is None else Path(columns.root).expanduser()
        self.confined = columns.root is not None
        if not self.root.is_dir():
            raise UserError(f"There is no folder '{self.root}', to which image paths are relative.")
        image, caption, self.group_column = find_columns(self.rows.columns, columns, path)
        self.rows.choose(image, caption, self.group_column)
        if not len(self.rows):
            raise UserError(f"The table '{path}' has no rows. It needs one for each pair.")

    def __len__(self) -> int:
        return len(self.rows)

    def entry(self, index: int) -> TableRow:
        return self.rows.row(index)

    def texts(self, entry: TableRow) -> tuple[str, ...]:
        captions = (text for cell in entry.values for text in as_texts(cell, "unreadable row", entry.key))
        return clean_captions(captions, entry.key)

    def group(self, index: int) -> int:
        return group_number(self.entry(index).group_cell) if self.group_column else 0

    def splits(self) -> dict[str, np.ndarray]:
        return self.rows.splits()

    def content(self, entry: TableRow) -> Path | bytes:
        image = entry.image_cell
        if isinstance(image, pa.Scalar):
            image = decoded(image, entry.key)
            if image and isinstance(entry.image_cell, pa.StructScalar):
                image = image.get("bytes") or image.get("path")
        if not image:
            raise BrokenPair("missing image", entry.key, "the row names none")
        if isinstance(image, bytes):
            return image
        if not isinstance(image, str):
            raise BrokenPair("missing image", entry.key, f"its cell is not a path: {str(image)[:40]}")
        if image.startswith(("http://", "https://")):
            raise BrokenPair("missing image", entry.key, "a web address; download the images and name the files")
        if "\\" in image and not os.path.exists(self.root / image):
            image = image.replace("\\", "/")  # written on Windows
        if self.confined:
            return image_below(self.root, image, entry.key, follow=True)
        return Path(os.path.normpath(self.root / os.path.expanduser(image)))

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:  # a worker process opens the table itself
        return TableSource, self._arguments


def open_rows(path: str | Path) -> TableRows:
    """Open the rows of a table: of a file, or of Parquet files by their folder or pattern."""
    path = Path(path).expanduser()
    if path.is_dir() or (not path.exists() and names_shards(str(path))):
        return ParquetRows(path)
    if not path.is_file() or path.suffix.lower() not in KINDS:
        remedy = "Save it as CSV (UTF-8)." if path.suffix.lower() in SPREADSHEETS else "Give a table of these formats."
        raise UserError(f"'{path.name}' is not a table that can be read: {', '.join(TABLE_KINDS)}. {remedy}")
    return KINDS[path.suffix.lower()](path)


def find_table(spec: str | Path) -> Path | None:
    """The table that a name means: a file, Parquet files, a folder's metadata; None for other sources."""
    text, path = str(spec), Path(spec).expanduser()
    if path.is_dir():
        if named := [path / name for name in METADATA if (path / name).is_file()]:
            return named[0]
        return path if holds(path, ".parquet") and not holds(path, ".tar") else None
    if names_shards(text):
        return path if text.lower().endswith(".parquet") and not is_url(text) else None
    return path if path.suffix.lower() in KINDS and path.exists() else None


def find_columns(names: Sequence[str], columns: Columns, where: Path | str) -> tuple[str, str, str | None]:
    """Find the columns of images, of captions (that of images where none is read) and of groups."""
    image = caption = find_column(names, columns.image, IMAGE_NAMES, "image", where)
    if columns.caption not in (None, columns.image):
        caption = find_column(names, columns.caption, CAPTION_NAMES, "caption", where)
    return image, caption, columns.group and find_column(names, columns.group, ("",), "group", where)


def find_column(columns: Sequence[str], given: str, usual: Sequence[str], what: str, path: Path | str) -> str:
    """Find a column by its name or, if that is `usual[0]` and missing, by another usual name in any case."""
    lower = by_lower_name(columns)
    names = [given, *(lower[name] for name in usual if given == usual[0] and name in lower)]
    column = next((name for name in names if name in columns), None)
    if column is None:
        exist = ", ".join(f"'{printable(name[:40])}'" for name in columns[:30]) or "none"
        raise UserError(
            f"The table '{path}' has no column '{given}' for the {what}. Its columns: {exist}. "
            f"Rename one, or name it: data.columns.{what}=NAME in training, Columns({what}=NAME) in Python, else the "
            "command's option."
        )
    if (count := list(columns).count(column)) > 1:
        raise UserError(f"The table '{path}' has {count} columns named '{printable(column)}'. Rename all but one.")
    return column
