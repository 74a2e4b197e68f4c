"""The columns of a table, or of dicts: those of images, captions and groups, found by their names."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from declip.data.columns import Columns, Missing, MissingColumns
from declip.data.pair import as_texts, clean_captions, printable
from declip.data.sources.names import BRACES
from declip.data.sources.rows import by_lower_name, label_text
from declip.errors import UserError

# Column names of public sets, most telling first; tried when the default column is missing.
IMAGE_NAMES = (
    "image",
    "file_name",
    "image_path",
    "filepath",
    "file_path",
    "path",
    "filename",
    "image_file",
    "img",
    "file",
)
CAPTION_NAMES = ("caption", "captions", "text", "texts", "title", "description", "sentences")
# Never tried, but named where captions are guessed
OTHER_TEXTS = ("keywords", "tags", "alt", "alt_text")
# Once per process, however often the table is opened
warn_once = cache(logging.getLogger("declip").warning)

Captions = dict[str, tuple[str, ...]]
"""Columns and templates of captions, with the columns that each reads: for a column itself."""


def find_columns(
    names: Sequence[str], columns: Columns, where: Path | str
) -> tuple[str, Captions, str | None]:
    """Find the columns of images, of captions (that of images where none is read) and of groups."""
    header = Header(names, where)
    image = header.column(columns.image, IMAGE_NAMES, "image")
    captions: Captions = {image: (image,)}
    if columns.caption is not None and columns.caption != columns.image:
        captions = header.captions(columns.caption)
    group = columns.group and header.column(columns.group, ("",), "group")
    if header.missing:
        raise MissingColumns(str(where), names, header.missing)
    return image, captions, group


@dataclass(frozen=True)
class Header:
    """The columns of a table, and those that were looked for and are missing."""

    names: Sequence[str]
    where: Path | str
    missing: Missing = field(default_factory=dict)

    def column(self, given: str, usual: Sequence[str], what: str) -> str:
        """Find a column by its name or, if that is the missing `usual[0]`, by another usual name in any case."""
        names = [given]
        if given == usual[0]:
            lower = by_lower_name(self.names)
            names += [lower[name] for name in usual if name in lower]
        column = next((name for name in names if name in self.names), None)
        if column is None:
            self.missing[given] = what
            return given
        count = list(self.names).count(column)
        if count > 1:
            columns = f"{count} columns named '{printable(column)}'"
            raise UserError(f"The table '{self.where}' has {columns}. Rename all but one.")
        return column

    def captions(self, given: str | Sequence[str]) -> Captions:
        """Find the columns of captions, which commas may separate, and of templates."""
        if given == CAPTION_NAMES[0]:
            caption = self.column(given, CAPTION_NAMES, "caption")
            lower = by_lower_name(self.names)
            others = [lower[name] for name in (*CAPTION_NAMES, *OTHER_TEXTS) if name in lower]
            unused = ", ".join(printable(name) for name in others if name != caption)
            if caption != given and unused:
                problem = f"Captions of '{Path(self.where).name}': {caption}. Not used: {unused}."
                remedy = "Name one or several by data.columns.caption in training, --caption-column elsewhere."
                warn_once(f"{problem} {remedy}")
            return {caption: (caption,)}
        captions = Captions()
        if isinstance(given, str):
            given = [given]
        for text in given:
            read = BRACES.findall(text)
            if text in self.names:
                captions[text] = (text,)
            elif read:
                captions[text] = tuple(read)
            else:
                listed = map(str.strip, text.split(","))
                captions |= {name: (name,) for name in listed}
        for name in chain.from_iterable(captions.values()):
            self.column(name, ("",), "caption")
        return captions


def read_captions(
    captions: Captions, rows: Iterable[Callable[[str], Any]], reason: str, key: str
) -> tuple[str, ...]:
    """The cleaned captions in rows of one image, which return the cell of a column; raises `BrokenPair`.

    A template with an empty cell gives no caption.
    """
    texts = list[str | None]()
    empty = dict[str, None]()
    for cell in rows:
        for text, columns in captions.items():
            if columns == (text,):
                texts += as_texts(cell(text), reason, key)
                continue
            values = {name: label_text(cell(name)) for name in columns}
            empty |= dict.fromkeys(name for name, value in values.items() if not value)
            if all(values.values()):
                pieces = BRACES.split(text)  # a text, a name, a text, a name … a text
                pieces[1::2] = map(values.__getitem__, columns)
                texts.append("".join(pieces))
    why = ""
    if empty:
        why = f"no {', '.join(empty)}"
    return clean_captions(texts, key, why)
