"""A table with a column of labels: its rows with classes, in splits where it has a column of them."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from declip.data.pair import BrokenPair, Pair, PairSource, is_unicode
from declip.data.sources.origin import Origin
from declip.data.sources.rows import JsonRow, JsonRows, ParquetRows, plain
from declip.data.sources.table import CAPTION_NAMES, IMAGE_NAMES, KINDS, TableSource, find_column, only_one
from declip.errors import UserError, unknown
from declip.evaluation.readers.images import Openers

LABEL_NAMES = ("label", "class", "class_name", "category")
"""Names of the column of labels where none is given, in the order of preference."""

SPLIT_COLUMN = "split"
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val"), "validation"
)

LONGEST_LABEL = 1_000
"""Characters. A label is a name, not a text."""

Cell = str | BrokenPair


class LabeledRows(PairSource):
    """Some rows of a table, with a class each.

    Args:
        rows: (n,) int64, indices into the table.
        labels: (n,) int64.
        broken: The table's rows without a label; each is a broken pair whose label, 0, means nothing.
        captioned: Whether the table has captions; without, the class name is the caption.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]

    def __init__(
        self,
        table: TableSource,
        rows: np.ndarray,
        labels: np.ndarray,
        class_names: Sequence[str],
        broken: dict[int, BrokenPair],
        captioned: bool,
    ) -> None:
        self.table, self.rows, self.broken, self.captioned = table, rows, broken, captioned
        self.name, self.labels, self.class_names = table.name, labels, tuple(class_names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        """Read pair `index`; raises `BrokenPair`."""
        captions, row = self.captions(index), int(self.rows[index])
        return Pair(self.table.key(row), self.table.image(row), captions)

    def key(self, index: int) -> str:
        """The key alone."""
        return self.table.key(int(self.rows[index]))

    def image(self, index: int) -> Image.Image:
        """The image alone."""
        return self.table.image(int(self.rows[index]))

    def origin(self, index: int) -> Origin:
        """Origin of image `index`; raises `BrokenPair`."""
        return self.table.origin(int(self.rows[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions or the class name; raises `BrokenPair`."""
        row = int(self.rows[index])
        if row in self.broken:
            raise self.broken[row]
        return self.table.captions(row) if self.captioned else (self.class_names[self.labels[index]],)


def label_column_of(path: Path, given: str | None) -> str | None:
    """Find a table's column of labels, as the table writes it; None where none was given and none is there."""
    if path.suffix.lower() not in KINDS or not path.is_file():
        raise UserError(f"'{path}' is not a table that can be read. Known: {', '.join(KINDS)}.")
    columns = KINDS[path.suffix.lower()](path).columns
    if given is None:
        lower = _by_lower_name(columns)
        return next((lower[name] for name in LABEL_NAMES if name in lower), None)
    if given not in columns:
        raise unknown(f"column of labels in '{path.name}'", given, columns)
    return only_one(columns, given, path)


def labeled_table(path: Path, label_column: str) -> Openers:
    """Open a table by its labels; `class_names` are the sorted distinct labels of all its splits.

    In a Parquet file that Hugging Face's `datasets` wrote, numbers stand for the names in its metadata. A column
    "split" with train, validation and test makes splits; without it all rows are the test.
    """
    columns = KINDS[path.suffix.lower()](path).columns
    lower = _by_lower_name(columns)
    captioned = any(name in lower for name in CAPTION_NAMES)
    image = find_column(columns, "image", IMAGE_NAMES, "image", path)
    table = TableSource(path, image, "caption" if captioned else image)
    cells = _cells(table, path, image, label_column)
    if len(cells) != len(table):
        raise UserError(f"'{path}' changed while it was read.")
    names = _known_names(path, label_column) or _ordered({cell for cell in cells if isinstance(cell, str)})
    if len(names) < 2:
        raise UserError(f"Column '{label_column}' of '{path}' has {len(names)} classes. It needs at least two.")
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.array([label_of.get(str(cell), 0) for cell in cells], dtype=np.int64)
    broken: dict[int, BrokenPair] = {}
    for row, cell in enumerate(cells):
        if isinstance(cell, BrokenPair):
            broken[row] = cell
        elif cell not in label_of:
            broken[row] = BrokenPair("missing label", table.key(row), f"'{cell}' is none of the classes")
    splits = _splits(table, path, image, lower.get(SPLIT_COLUMN))
    return {
        which: partial(LabeledRows, table, rows, labels[rows], names, broken, captioned)
        for which, rows in splits.items()
    }


def _splits(table: TableSource, path: Path, image: str, column: str | None) -> dict[str, np.ndarray]:
    if column is None:
        return {"test": np.arange(len(table))}
    rows: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for row, cell in enumerate(_cells(table, path, image, column)):
        if isinstance(cell, str):
            which, shown = SPLIT_NAMES.get(cell.lower()), f"'{cell}'"
        else:
            # A damaged row counts among the test's broken pairs; one that only lacks its split is the user's to fix.
            which, shown = "test" if cell.reason == "unreadable row" else None, f"not one value for '{cell.key}'"
        if which is None:
            raise UserError(f"Column '{column}' of '{path}' has {shown}. Known: train, validation, test.")
        rows[which].append(row)
    if not rows["test"]:
        raise UserError(f"Column '{column}' of '{path}' has no 'test', so there is nothing to measure on.")
    return {which: np.array(members, dtype=np.int64) for which, members in rows.items() if members}


def _by_lower_name(columns: Sequence[str]) -> dict[str, str]:
    return {name.strip().lower(): name for name in reversed(columns)}


def _ordered(names: set[str]) -> list[str]:
    """Sort as numbers where all are whole numbers, else as text."""
    numbers = all(name.isdecimal() and len(name) < 20 for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def _cells(table: TableSource, path: Path, image: str, column: str) -> list[Cell]:
    """For each pair of the table, its one value in a column as text, or the reason why it has none."""
    rows = table.rows
    cells: list[Cell] = []
    if isinstance(rows, ParquetRows):
        names = _known_names(path, column)
        try:
            values = pq.read_table(path, columns=[column])[column]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(f"'{path}' is damaged: {error}.") from error
        for index in range(len(rows)):
            numbers = rows.numbers(index)
            cells.append(_named([values[number] for number in numbers], names, f"row {numbers[0]}"))
        return cells
    if not isinstance(rows, JsonRows):
        rows = KINDS[path.suffix.lower()](path)
        rows.choose(image, column)  # the column in place of captions
    for index in range(len(rows)):
        try:
            row = rows.row(index)
            cells.append(_text(row.cells(column) if isinstance(row, JsonRow) else row.captions(), row.key))
        except BrokenPair as broken:
            cells.append(broken)
    return cells


def _named(cells: Sequence[pa.Scalar], names: Sequence[str], key: str) -> Cell:
    """The label of an image's cells; a number stands for one of `names`, if there are any."""
    try:
        values = [plain(cell, key) for cell in cells]
    except BrokenPair as broken:
        return broken
    known = range(len(names))
    return _text([names[value] if isinstance(value, int) and value in known else value for value in values], key)


def _text(values: Sequence[Any], key: str) -> Cell:
    """One label from the cells of one image; whole numbers and strings are labels."""
    if any(isinstance(value, str) and len(value) > LONGEST_LABEL for value in values):
        return BrokenPair("label too long", key, f"more than {LONGEST_LABEL:,} characters")
    texts = {" ".join(str(value).split()) if isinstance(value, str | int) else "" for value in values}
    if "" in texts:
        return BrokenPair("missing label", key)
    if not all(map(is_unicode, texts)):
        return BrokenPair("invalid text", key, "half of a character that takes two code units")
    return texts.pop() if len(texts) == 1 else BrokenPair("conflicting labels", key, ", ".join(sorted(texts)))


def _known_names(path: Path, column: str) -> list[str]:
    """The names that Hugging Face's `datasets` stores for a column of class numbers; none for other files."""
    if path.suffix.lower() != ".parquet":
        return []
    metadata = (pq.read_schema(path).metadata or {}).get(b"huggingface")
    try:
        names = json.loads(metadata)["info"]["features"][column]["names"] if metadata else []
        return [" ".join(name.split()) for name in names]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return []
