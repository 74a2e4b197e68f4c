"""Lists of pairs to leave out: written by `declip app` or `declip data inspect`, or by hand, one key per line."""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from declip.data.pair import PairSource, printable
from declip.data.sources.image_source import ImageSource
from declip.errors import UserError

COLUMNS = ("key", "place", "reason", "cosine", "caption")
EXCLUDED = "excluded"  # the reason where a list gives none
LONGEST_REASON = 80  # characters: counts are kept by reason

FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""Beginnings of cells that a spreadsheet computes. They are written with an apostrophe before them, which shows them as
text, and read without it; so are cells that begin with such an apostrophe already."""

LARGEST_LIST = 1 << 30  # bytes of a list


class Exclusion(NamedTuple):
    """A pair of a list: its key, its index in the source (-1 where unknown) and the reason why it is left out."""

    key: str
    place: int = -1
    reason: str = EXCLUDED


class Exclusions(NamedTuple):
    """A list matched with a source: the reason by index, and the keys that the source does not have."""

    reasons: dict[int, str]
    missing: list[str]


def write_exclusions(rows: Iterable[tuple[str, int, str, float | None, str]]) -> str:
    """A list as CSV text of rows as `COLUMNS` names them; only the first three are read back."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for key, place, reason, cosine, caption in rows:
        key, reason, caption = (f"'{cell}" if FORMULA.match(cell) else cell for cell in (key, reason, caption))
        writer.writerow([key, place, reason, "" if cosine is None else f"{cosine:.4f}", caption])
    return text.getvalue()


def read_exclusions(path: str | Path) -> list[Exclusion]:
    """Read a list: CSV with a column "key" and perhaps "place" and "reason", or plain text with one key per line."""
    path = Path(path).expanduser()
    if not path.is_file() or path.stat().st_size > LARGEST_LIST:
        raise UserError(
            f"There is no list '{path}' of at most {LARGEST_LIST:,} bytes. Give a CSV file with a column 'key', or "
            "a text file of keys."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
        header = next(csv.reader(text.splitlines()[:1]), [])
        if "key" in [name.strip().lower() for name in header]:
            rows = _from_csv(text, path)
        else:
            rows = [Exclusion(line.strip()) for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The list '{path}' cannot be read: {error}. Give CSV or text in UTF-8.") from error
    if not rows:
        raise UserError(f"The list '{path}' names no pair.")
    return rows


def match_exclusions(source: PairSource, rows: Iterable[Exclusion]) -> Exclusions:
    """Find the pairs of a list in a source: the pair at the row's place if that has its key, else all with its key."""
    images = ImageSource(source)
    reasons: dict[int, str] = {}
    elsewhere: dict[str, str] = {}
    for row in rows:
        if 0 <= row.place < len(images) and images.key(row.place) == row.key:
            reasons[row.place] = row.reason
        else:
            elsewhere.setdefault(row.key, row.reason)
    seen = set[str]()
    for place in range(len(images)) if elsewhere else ():
        if (key := images.key(place)) in elsewhere:
            seen.add(key)
            reasons.setdefault(place, elsewhere[key])
    return Exclusions(reasons, [key for key in elsewhere if key not in seen])


def _from_csv(text: str, path: Path) -> list[Exclusion]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    rows = []
    for row in reader:
        place = (row.get("place") or "").strip()
        if place and not (place.isascii() and place.isdigit() and len(place) < 19):
            line = f"line {reader.line_num}"
            raise UserError(f"The list '{path}' has the place '{printable(place)}' in {line}; it must be a number.")
        if key := row["key"] or "":
            reason = printable(_as_text((row.get("reason") or "").strip())[:LONGEST_REASON]) or EXCLUDED
            rows.append(Exclusion(_as_text(key), int(place) if place else -1, reason))
    return rows


def _as_text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
