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
from declip.data.sources.origin import Origin, bytes_origin, file_origin
from declip.data.sources.rows import Delimited, JsonLines, ParquetRows
from declip.errors import UserError

IMAGE_NAMES = ("image", "image_path", "filepath", "file_path", "path", "filename", "file_name", "image_file", "img")
CAPTION_NAMES = ("caption", "captions", "text", "texts", "title", "description", "sentences")
"""What the columns of public sets are called, most telling first; looked for when the column asked for is missing."""

MOST_COMPARED = 1_000
"""Columns among which one of a like name is looked for; a file can have millions."""


class Rows(Protocol):
    """The two wanted columns of a table, read row by row."""

    columns: Sequence[str]
    """All columns that the table has."""

    def choose(self, image: str, caption: str) -> None:
        """Say which two columns are meant; everything below needs it."""
        ...

    def __len__(self) -> int: ...

    def key(self, index: int) -> str:
        """Name of the row for the user, without reading its image."""
        ...

    def image(self, index: int) -> str | bytes | None:
        """Path or content of the image, None where the cell is empty; raises `BrokenPair`."""
        ...

    def captions(self, index: int) -> list[str | None]:
        """Captions as they were written; raises `BrokenPair`."""
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

    In JSONL and Parquet a row is a pair and its caption may be a list. In CSV and TSV a row holds one caption, and
    rows with the same image path are one pair with several captions, in the order of the file.

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
        captions = self.captions(index)
        return Pair(self.rows.key(index), self.image(index), captions)

    def key(self, index: int) -> str:
        """The image's path, else the row's number; raises `BrokenPair`."""
        return self.rows.key(index)

    def image(self, index: int) -> Image.Image:
        """The image of pair `index`, without its captions; raises `BrokenPair`."""
        return decode(self._content(index), self.rows.key(index))

    def read_lazy(self, index: int) -> UndecodedPair:
        """The pair with its picture opened only; raises `BrokenPair`."""
        captions, key = self.captions(index), self.rows.key(index)
        return UndecodedPair(key, open_picture(self._content(index), key), captions)

    def origin(self, index: int) -> Origin:
        """Where the image is; raises `BrokenPair`."""
        content = self._content(index)
        return file_origin(content) if isinstance(content, Path) else bytes_origin(content)

    def captions(self, index: int) -> tuple[str, ...]:
        """The cleaned captions of pair `index`; raises `BrokenPair`."""
        return clean_captions(self.rows.captions(index), self.rows.key(index))

    def _content(self, index: int) -> Path | bytes:
        """The file of a pair's image, or its bytes."""
        key, image = self.rows.key(index), self.rows.image(index)
        if not image:
            raise BrokenPair("missing image", key, "the table names none")
        return image if isinstance(image, bytes) else self._locate(image, key)

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
        UserError: None of them exists; the message lists those that do and the nearest.
    """
    if given in columns:
        return given
    lower = {name.strip().lower(): name for name in reversed(columns)}
    for name in usual if given == usual[0] else ():
        if name in lower:
            return lower[name]
    near = get_close_matches(given, columns[:MOST_COMPARED], n=1, cutoff=0.5)
    hint = f" Did you mean '{printable(near[0])}'?" if near else ""
    exist = ", ".join(f"'{printable(name[:40])}'" for name in columns[:30]) or "none"
    raise UserError(
        f"The table '{path}' has no column '{given}' for the {what}.{hint} Its columns: {exist}. "
        f"Name the right one with {what}_column. In a recipe it is data.{what}_column."
    )
