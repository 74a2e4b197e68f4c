"""Lists of pairs to leave out: written by the page of `declip app`, or by hand, one key a line."""

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from declip.data.pair import PairSource, printable
from declip.data.sources.image_source import ImageSource
from declip.errors import UserError

COLUMNS = ("key", "place", "reason", "cosine", "caption")
DROPPED = "dropped"
"""The reason where a list gives none."""

LONGEST_REASON = 80
"""Characters: reasons are what counts are kept by."""

FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""How cells begin that a spreadsheet computes. They are written with an apostrophe before them, which shows them as
text, and read without it; so are those that begin with such an apostrophe already, to be read as they were."""

LARGEST_LIST = 1 << 30
"""Bytes of a list."""


class Dropped(NamedTuple):
    """A pair of a list.

    Attributes:
        key: As the source calls it.
        place: In the source, where that is known; -1 otherwise.
        reason: Why it goes.
    """

    key: str
    place: int = -1
    reason: str = DROPPED


@dataclass
class Found:
    """A list compared with a source.

    Attributes:
        reasons: The places to leave out, and why.
        missing: Keys of the list that the source does not have.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def write_drop_list(rows: Iterable[tuple[str, int, str, float | None, str]]) -> str:
    """A list as CSV text, with `COLUMNS`; only the first three are read back.

    Args:
        rows: Of each pair its key, place, reason, cosine of image and caption or None, and caption.
    """
    written = io.StringIO(newline="")
    writer = csv.writer(written)
    writer.writerow(COLUMNS)
    for key, place, reason, cosine, caption in rows:
        key, reason, caption = (f"'{cell}" if FORMULA.match(cell) else cell for cell in (key, reason, caption))
        writer.writerow([key, place, reason, "" if cosine is None else f"{cosine:.4f}", caption])
    return written.getvalue()


def read_drop_list(path: str | Path) -> list[Dropped]:
    """Read a list: CSV with a column "key" and perhaps "place" and "reason", or plain text with a key a line.

    Raises:
        UserError: There is no such file, it is too large or no text, a place is no number, or it names no pair.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"There is no list '{path}'. Give a CSV file with a column 'key', or a text file of keys.")
    if path.stat().st_size > LARGEST_LIST:
        raise UserError(f"The list '{path}' is larger than {LARGEST_LIST:,} bytes. Is it another file?")
    try:
        text = path.read_bytes().decode("utf-8-sig")
        rows = _of_csv(text, path) if _is_csv(text) else _of_lines(text)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"The list '{path}' cannot be read: {error}. Give CSV or text in UTF-8.") from error
    if not rows:
        raise UserError(f"The list '{path}' names no pair.")
    return rows


def find_dropped(source: PairSource, rows: Iterable[Dropped]) -> Found:
    """Find the pairs of a list in a source.

    A row means the pair at its place if that has its key, and otherwise every pair with its key.
    """
    images = ImageSource(source)
    found, elsewhere = Found(), defaultdict[str, list[Dropped]](list)
    for row in rows:
        if 0 <= row.place < len(images) and images.key(row.place) == row.key:
            found.reasons[row.place] = row.reason
        else:
            elsewhere[row.key].append(row)
    if elsewhere:
        met = set[str]()
        for place in range(len(images)):
            if (key := images.key(place)) in elsewhere:
                met.add(key)
                found.reasons.setdefault(place, elsewhere[key][0].reason)
        found.missing = [key for key in elsewhere if key not in met]
    return found


def _is_csv(text: str) -> bool:
    header = next(csv.reader(text.splitlines()[:1]), [])
    return "key" in [name.strip().lower() for name in header]


def _of_lines(text: str) -> list[Dropped]:
    return [Dropped(line.strip()) for line in text.splitlines() if line.strip()]


def _of_csv(text: str, path: Path) -> list[Dropped]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
    rows = []
    for row in reader:
        place = (row.get("place") or "").strip()
        if place and not (place.isascii() and place.isdigit() and len(place) < 19):
            line = f"line {reader.line_num}"
            raise UserError(f"The list '{path}' has the place '{printable(place)}' in {line}; it must be a number.")
        if key := row["key"] or "":
            reason = printable(_as_text((row.get("reason") or "").strip())[:LONGEST_REASON]) or DROPPED
            rows.append(Dropped(_as_text(key), int(place) if place else -1, reason))
    return rows


def _as_text(cell: str) -> str:
    """A cell without the apostrophe that kept a spreadsheet from computing it."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
