"""Tables with a column of labels, of splits, or both."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from declip.data.columns import Columns
from declip.data.pair import BrokenPair, is_unicode
from declip.data.sources.rows import TableRows, by_lower_name, cell_name
from declip.data.sources.subset import Subset
from declip.data.sources.table import CAPTION_NAMES, IMAGE_NAMES, TableSource, find_column, open_rows
from declip.errors import UserError, unknown
from declip.evaluation.readers.images import Classified, Openers

LABEL_NAMES = ("label", "class", "class_name", "category")
"""Default names of the label column, in order of preference."""

LONGEST_LABEL = 1_000  # characters: a label is a name, not a text

Cell = str | BrokenPair


def labeled_table(table_path: str | Path, label_column: str | None) -> Openers | None:
    """Open a table with labels or splits; None if it has neither.

    `class_names` are the sorted labels of all splits, or the names that Hugging Face's `datasets` wrote into a Parquet
    file for its numbers. A column "split" defines splits; without it, all rows are test rows.
    """
    rows = open_rows(table_path)
    path, columns = rows.path, rows.columns
    lower = by_lower_name(columns).keys()
    captioned, labeled = (not lower.isdisjoint(names) for names in (CAPTION_NAMES, LABEL_NAMES))
    labeled = labeled or label_column is not None
    if not labeled and not (captioned and "split" in lower):
        return None
    if label_column is not None and label_column not in columns:
        raise unknown(f"column of labels in '{path.name}'", label_column, columns)
    image = find_column(columns, "image", IMAGE_NAMES, "image", path)
    column = None
    if labeled:
        column = find_column(columns, label_column or LABEL_NAMES[0], LABEL_NAMES, "label", path)
    # --- the pairs of the table, and the rows of each split
    table = TableSource(table_path, Columns(image, "caption" if captioned else None, group=column))
    rows_of = _rows_of(table)
    if column is None:
        return {which: partial(Subset, table, places) for which, places in rows_of.items()}
    # --- class names
    cells = _cells(table, column)
    names = _known_names(rows, column) or _ordered({cell for cell in cells if isinstance(cell, str)})
    if len(names) < 2:
        raise UserError(f"Column '{column}' of '{path}' has {len(names)} classes. It needs at least two.")
    labels, broken = _labels(cells, names, table)
    return {
        which: partial(Classified, table, labels[rows], names, rows=rows, captioned=captioned, broken=broken)
        for which, rows in rows_of.items()
    }


def _labels(cells: list[Cell], names: list[str], table: TableSource) -> tuple[np.ndarray, dict[int, BrokenPair]]:
    """The number of the class of each row, (n,) int64, and the reasons of rows without a class."""
    label_of = {name: label for label, name in enumerate(names)}
    labels = np.zeros(len(cells), dtype=np.int64)
    broken: dict[int, BrokenPair] = {}
    for row, cell in enumerate(cells):
        if isinstance(cell, BrokenPair):
            broken[row] = cell
        elif cell in label_of:
            labels[row] = label_of[cell]
        else:
            broken[row] = BrokenPair("missing label", table.key(row), f"'{cell}' is not one of the classes")
    return labels, broken


def _rows_of(table: TableSource) -> dict[str, np.ndarray]:
    """The rows of each non-empty split; all rows are test rows without a split column."""
    splits = table.splits() or {"test": np.arange(len(table))}
    if "test" not in splits:
        raise UserError(f"'{table.name}' has no test pairs: its splits are {', '.join(splits)}. Name some rows 'test'.")
    return splits


def _ordered(names: set[str]) -> list[str]:
    """Sort as numbers if all are whole numbers, otherwise as text."""
    numbers = all(name.isdecimal() and len(name) < 20 for name in names)
    return sorted(names, key=int) if numbers else sorted(names)


def _cells(table: TableSource, column: str) -> list[Cell]:
    """The value of a column for each pair as text, or the reason why it has none."""
    names = _known_names(table.file, column)
    cells: list[Cell] = []
    for index in range(len(table)):
        try:
            entry = table.entry(index)
            given = [v for cell in table.cells(entry, column) for v in (cell if isinstance(cell, list) else [cell])]
            values = [names[v] if isinstance(v, int) and 0 <= v < len(names) else v for v in given]
            cells.append(_text(entry.key, values))
        except BrokenPair as broken:
            cells.append(broken)
    return cells


def _known_names(rows: TableRows, column: str) -> list[str]:
    """The names that Hugging Face's `datasets` stores for a column of class numbers; none for other files."""
    try:
        names = json.loads(rows.metadata[b"huggingface"])["info"]["features"][column]["names"]
        return [" ".join(name.split()) for name in names]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return []


def _text(key: str, values: Sequence[Any]) -> str:
    """Return the single label in the cells of one image, strings or numbers; raises `BrokenPair`."""
    if any(isinstance(value, str) and len(value) > LONGEST_LABEL for value in values):
        raise BrokenPair("label too long", key, f"more than {LONGEST_LABEL:,} characters")
    texts = {" ".join(cell_name(value).split()) for value in values}
    if "" in texts:
        raise BrokenPair("missing label", key)
    if not all(map(is_unicode, texts)):
        raise BrokenPair("invalid text", key, "half of a character that takes two code units")
    if len(texts) > 1:
        raise BrokenPair("conflicting labels", key, ", ".join(sorted(texts)))
    return texts.pop()
