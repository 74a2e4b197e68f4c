"""A table with a column of labels: its rows as classes, split where it has a column that says so."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from declip.data.pair import BrokenPair, Pair, is_unicode
from declip.data.sources.origin import Origin
from declip.data.sources.rows import JsonLines, ParquetRows, plain
from declip.data.sources.table import CAPTION_NAMES, IMAGE_NAMES, KINDS, TableSource, find_column, only_one
from declip.errors import UserError, unknown
from declip.evaluation.readers.splits import Openers

LABEL_NAMES = ("label", "class", "class_name", "category")
"""What the column of labels is called where none is named, most telling first."""

SPLIT_COLUMN = "split"
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("validation", "valid", "val"), "validation"
)

LONGEST_LABEL = 1_000
"""Characters. A label is a name, not a text."""

Cell = str | BrokenPair


class LabeledRows:
    """Some rows of a table, with a class each.

    Args:
        table: The table.
        rows: (n,) int64, places in it.
        labels: (n,) int64.
        class_names: What zero-shot puts into templates.
        broken: Rows without one class of their own; each is a broken pair whose label, 0, means nothing.
        captioned: Whether the table has captions; without, the class name is the caption.
    """

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

    def origin(self, index: int) -> Origin:
        """Where the image is; raises `BrokenPair`."""
        return self.table.origin(int(self.rows[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions or the class name; raises `BrokenPair`."""
        row = int(self.rows[index])
        if row in self.broken:
            raise self.broken[row]
        return self.table.captions(row) if self.captioned else (self.class_names[self.labels[index]],)


def label_column_of(path: Path, given: str | None) -> str | None:
    """Find a table's column of labels.

    Args:
        path: The table.
        given: The column asked for; None looks for `LABEL_NAMES`.

    Returns:
        The column as the table writes it, None where none was asked for and none is there.

    Raises:
        UserError: it is no table, or the column asked for is not there.
    """
    if path.suffix.lower() not in KINDS or not path.is_file():
        raise UserError(f"'{path}' is not a table that can be read. Known: {', '.join(KINDS)}.")
    columns = KINDS[path.suffix.lower()](path).columns
    if given is not None and given not in columns:
        raise unknown(f"column of labels in '{path.name}'", given, columns)
    if given is not None:
        return only_one(columns, given, path)
    lower = {name.strip().lower(): name for name in reversed(columns)}
    return next((lower[name] for name in LABEL_NAMES if name in lower), None)


def labeled_table(path: Path, label_column: str) -> Openers:
    """Open a table by its labels; `class_names` are the sorted distinct labels of all its splits.

    In a Parquet file that Hugging Face's `datasets` wrote, numbers stand for the names in its metadata. A column
    "split" with train, validation and test makes splits; without it all rows are the test.

    Raises:
        UserError: there are fewer than two classes, an unknown split, or none to measure on.
    """
    columns = KINDS[path.suffix.lower()](path).columns
    lower = {name.strip().lower(): name for name in reversed(columns)}
    captioned = any(name in lower for name in CAPTION_NAMES)
    image = find_column(columns, "image", IMAGE_NAMES, "image", path)
    table = TableSource(path, image, "caption" if captioned else image)
    cells = _cells(table, path, image, label_column)
    if len(cells) != len(table):
        raise UserError(f"'{path}' changed while it was read.")
    names = _known_names(path, label_column) or _ordered({cell for cell in cells if isinstance(cell, str)})
    if len(names) < 2:
        raise UserError(f"Column '{label_column}' of '{path}' has {len(names)} classes. It needs at least two.")
    number = {name: label for label, name in enumerate(names)}
    labels = np.array([number.get(str(cell), 0) for cell in cells], dtype=np.int64)
    broken = {row: cell for row, cell in enumerate(cells) if isinstance(cell, BrokenPair)}
    for row, cell in enumerate(cells):
        if isinstance(cell, str) and cell not in number:
            broken[row] = BrokenPair("missing label", table.key(row), f"'{cell}' is none of the classes")
    splits = _splits(table, path, image, lower.get(SPLIT_COLUMN))
    return {
        which: partial(LabeledRows, table, rows, labels[rows], names, _within(broken, rows), captioned)
        for which, rows in splits.items()
    }


def _splits(table: TableSource, path: Path, image: str, column: str | None) -> dict[str, np.ndarray]:
    if column is None:
        return {"test": np.arange(len(table))}
    given = _cells(table, path, image, column)
    # A damaged row is counted among the test's broken pairs; one that only lacks its split is the user's to mend.
    found = [
        SPLIT_NAMES.get(cell.lower()) if isinstance(cell, str) else "test" if cell.reason == "unreadable row" else None
        for cell in given
    ]
    if None in found:
        wrong = given[found.index(None)]
        what = f"'{wrong}'" if isinstance(wrong, str) else f"not one value for '{wrong.key}'"
        raise UserError(f"Column '{column}' of '{path}' has {what}. Known: train, validation, test.")
    splits = {which: np.flatnonzero([each == which for each in found]) for which in ("train", "validation", "test")}
    splits = {which: rows for which, rows in splits.items() if len(rows)}
    if "test" not in splits:
        raise UserError(f"Column '{column}' of '{path}' has no 'test', so there is nothing to measure on.")
    return splits


def _within(broken: dict[int, BrokenPair], rows: np.ndarray) -> dict[int, BrokenPair]:
    return {int(row): broken[int(row)] for row in rows if int(row) in broken} if broken else {}


def _ordered(names: set[str]) -> list[str]:
    """Sorted: as numbers where all are whole numbers, else as text."""
    numbers = all(name.isdecimal() and len(name) < 20 for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def _cells(table: TableSource, path: Path, image: str, column: str) -> list[Cell]:
    """Of each pair of the table, its one value in a column as text, or why it has none."""
    rows = table.rows
    if isinstance(rows, ParquetRows):
        names = _known_names(path, column)
        try:
            cells = pq.read_table(path, columns=[column])[column]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise UserError(f"'{path}' is damaged: {error}.") from error
        numbers = map(rows.numbers, range(len(rows)))
        return [_named([cells[number] for number in own], names, f"row {own[0]}") for own in numbers]
    if not isinstance(rows, JsonLines):
        rows = KINDS[path.suffix.lower()](path)
        rows.choose(image, column)
    found: list[Cell] = []
    for index in range(len(rows)):
        try:
            row = rows.row(index)
            found.append(_text(rows.cells(index, column) if isinstance(rows, JsonLines) else row.captions(), row.key))
        except BrokenPair as broken:
            found.append(broken)
    return found


def _named(cells: Sequence[pa.Scalar], names: Sequence[str], key: str) -> Cell:
    try:
        values = [plain(cell, key) for cell in cells]
    except BrokenPair as broken:
        return broken
    return _text([names[value] if _is_place(value, names) else value for value in values], key)


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
    """The names that Hugging Face's `datasets` keeps for a column of class numbers; none for other files."""
    if path.suffix.lower() != ".parquet":
        return []
    kept = (pq.read_schema(path).metadata or {}).get(b"huggingface")
    try:
        names = json.loads(kept)["info"]["features"][column]["names"] if kept else []
        return [" ".join(name.split()) for name in names]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return []


def _is_place(value: Any, names: Sequence[str]) -> bool:
    return isinstance(value, int) and 0 <= value < len(names)
