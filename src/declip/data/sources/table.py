"""Pairs from a table: JSONL, CSV, TSV or Parquet, with an image path or image bytes and captions in each row."""

import os
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Protocol

from PIL import Image

from declip.data.images.decode import decode, image_below
from declip.data.images.lazy import UndecodedPair, open_picture
from declip.data.pair import BrokenPair, Pair, clean_captions, printable
from declip.data.sources.csv import Delimited
from declip.data.sources.origin import Origin, bytes_origin, file_origin
from declip.data.sources.rows import JsonLines, ParquetRows, Row
from declip.errors import UserError

IMAGE_NAMES = ("image", "image_path", "filepath", "file_path", "path", "filename", "file_name", "image_file", "img")
CAPTION_NAMES = ("caption", "captions", "text", "texts", "title", "description", "sentences")
"""What the columns of public sets are called, most telling first; looked for when the column asked for is missing."""

MOST_COMPARED = 1_000
"""Columns among which one of a like name is looked for; a file can have millions."""


class Rows(Protocol):
    """The two wanted columns of a table, as pairs: rows of the same image are one, in the order of their first row."""

    columns: Sequence[str]
    """All columns that the table has."""

    def choose(self, image: str, caption: str) -> None:
        """Say which two columns are meant; everything below needs it."""
        ...

    def __len__(self) -> int: ...

    def row(self, index: int) -> Row:
        """Read and parse a pair once, without the image's content; raises `BrokenPair`."""
        ...


KINDS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": JsonLines,
    ".json": JsonLines,  # the authors' YFCC15M list is named so
    ".csv": partial(Delimited, delimiter=","),
    ".tsv": partial(Delimited, delimiter="\t"),
    ".parquet": ParquetRows,
}
TABLE_KINDS = tuple(KINDS)


class TableSource:
    """Pairs from the rows of a table.

    Rows with the same image are one pair with several captions, in the order of the file. The same image is the same
    path as written or, for images in Parquet, the same bytes. In JSONL and Parquet a row's caption may be a list.

    Args:
        path: The table.
        image_column: Column with the image: a path or, in Parquet, bytes or a struct of `bytes` and `path`.
        caption_column: Column with the caption, or in JSONL and Parquet a list of them.
        image_root: Folder that paths are relative to and may not leave, by a link neither. None: the table's folder,
            and any path goes.

    Raises:
        UserError: The table is missing, empty or no table, or a column is missing.
    """

    def __init__(
        self,
        path: str | Path,
        image_column: str = "image",
        caption_column: str = "caption",
        image_root: str | Path | None = None,
    ) -> None:
        path = Path(path).expanduser()
        if not path.is_file():
            raise UserError(f"There is no table '{path}'.")
        self._arguments = (path, image_column, caption_column, image_root)
        self.name = path.name
        self.root = path.parent if image_root is None else Path(image_root).expanduser()
        self.confined = image_root is not None
        if not self.root.is_dir():
            raise UserError(f"There is no folder '{self.root}' that image paths could be relative to.")
        if path.suffix.lower() not in KINDS:
            raise UserError(f"'{path.name}' is not a table that can be read. Known: {', '.join(TABLE_KINDS)}.")
        self.rows = KINDS[path.suffix.lower()](path)
        image = find_column(self.rows.columns, image_column, IMAGE_NAMES, "image", path)
        caption = find_column(self.rows.columns, caption_column, CAPTION_NAMES, "caption", path)
        self.rows.choose(image, caption)
        if not len(self.rows):
            raise UserError(f"The table '{path}' has no rows. It needs one for each pair.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        row = self.rows.row(index)
        captions = clean_captions(row.captions(), row.key)
        return Pair(row.key, decode(self._content(row), row.key), captions)

    def key(self, index: int) -> str:
        """The image's path, else the row's number; raises `BrokenPair`."""
        return self.rows.row(index).key

    def image(self, index: int) -> Image.Image:
        """The image of pair `index`, without its captions; raises `BrokenPair`."""
        row = self.rows.row(index)
        return decode(self._content(row), row.key)

    def read_lazy(self, index: int) -> UndecodedPair:
        """The pair with its picture opened only; raises `BrokenPair`."""
        row = self.rows.row(index)
        captions = clean_captions(row.captions(), row.key)
        return UndecodedPair(row.key, open_picture(self._content(row), row.key), captions)

    def origin(self, index: int) -> Origin:
        """Where the image is; raises `BrokenPair`."""
        content = self._content(self.rows.row(index))
        return file_origin(content) if isinstance(content, Path) else bytes_origin(content)

    def captions(self, index: int) -> tuple[str, ...]:
        """The cleaned captions of pair `index`; raises `BrokenPair`."""
        row = self.rows.row(index)
        return clean_captions(row.captions(), row.key)

    def _content(self, row: Row) -> Path | bytes:
        """The file of a pair's image, or its bytes."""
        image = row.image()
        if not image:
            raise BrokenPair("missing image", row.key, "the table names none")
        return image if isinstance(image, bytes) else self._locate(image, row.key)

    def _locate(self, path: str, key: str) -> Path:
        """Where the image is."""
        if path.startswith(("http://", "https://")):
            raise BrokenPair("missing image", key, "a web address; download the images and name the files")
        if self.confined:
            return image_below(self.root, path, key, follow=True)
        return Path(os.path.normpath(self.root / path))

    def __reduce__(self) -> tuple[type["TableSource"], tuple[object, ...]]:
        """Pickled as what to open, so that a worker process opens the table itself."""
        return TableSource, self._arguments


def find_column(columns: Sequence[str], given: str, usual: Sequence[str], what: str, path: Path) -> str:
    """Find a column: as given or, where that is the default and missing, by another usual name.

    Args:
        columns: The columns that exist.
        given: The name asked for.
        usual: Usual names, the default first; compared without case.
        what: What the column holds, for the message.
        path: The table, for the message.

    Returns:
        The column's name as the table writes it.

    Raises:
        UserError: None of them exists; the message lists those that do and the nearest. Or two columns have the name.
    """
    if given in columns:
        return only_one(columns, given, path)
    lower = {name.strip().lower(): name for name in reversed(columns)}
    for name in usual if given == usual[0] else ():
        if name in lower:
            return only_one(columns, lower[name], path)
    near = get_close_matches(given, columns[:MOST_COMPARED], n=1, cutoff=0.5)
    hint = f" Did you mean '{printable(near[0])}'?" if near else ""
    exist = ", ".join(f"'{printable(name[:40])}'" for name in columns[:30]) or "none"
    raise UserError(
        f"The table '{path}' has no column '{given}' for the {what}.{hint} Its columns: {exist}. "
        f"Name the right one with {what}_column. In a recipe it is data.{what}_column."
    )


def only_one(columns: Sequence[str], name: str, path: Path) -> str:
    """Give the name back; raises `UserError` where several columns have it."""
    if (count := list(columns).count(name)) > 1:
        raise UserError(f"The table '{path}' has {count} columns named '{printable(name)}'. Rename all but one.")
    return name
