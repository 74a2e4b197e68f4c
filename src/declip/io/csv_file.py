"""Tables that are written for people: .csv files, which a spreadsheet opens."""

import re
from pathlib import Path

from declip.errors import UserError

FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""Beginnings of cells that a spreadsheet evaluates; an apostrophe before them makes them text."""


def plain(cell: str) -> str:
    """A cell that a spreadsheet does not compute as a formula."""
    return f"'{cell}" if FORMULA.match(cell) else cell


def csv_path(given: str | Path, option: str = "--out") -> Path:
    """Return the path of a table to write; raises `UserError` if it is not a .csv file."""
    path = Path(given).expanduser()
    if path.suffix.lower() != ".csv" or path.is_dir():
        raise UserError(f"A table is written to a .csv file, not to '{given}'. Choose another path with {option}.")
    return path
