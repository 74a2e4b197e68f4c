"""Lists of pairs to leave out: written by `declip app` or `declip data inspect`, or by hand, one key per line."""

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
EXCLUDED = "excluded"
"""The reason where a list gives none."""

LONGEST_REASON = 80
"""Characters: counts are kept by reason."""

FORMULA = re.compile(r"'*[=+\-@\t\r]")
"""Beginnings of cells that a spreadsheet computes. They are written with an apostrophe before them, which shows them as
text, and read without it; so are cells that begin with such an apostrophe already."""

LARGEST_LIST = 1 << 30
"""Bytes of a list."""


class Exclusion(NamedTuple):
    """A pair of a list: its key, its index in the source (-1 where unknown) and the reason why it is left out."""

    key: str
    place: int = -1
    reason: str = EXCLUDED


@dataclass
class Exclusions:
    """A list matched with a source: the reason by index, and the keys that the source does not have."""

    reasons: dict[int, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)


def write_exclusions(rows: Iterable[tuple[str, int, str, float | None, str]]) -> str:
    """A list as CSV text, with `COLUMNS`; only the first three are read back.

    Args:
        rows: Key, place, reason, cosine of image and caption or None, and caption of each pair.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    for key, place, reason, cosine, caption in rows:
        key, reason, caption = (f"'{cell}" if FORMULA.match(cell) else cell for cell in (key, reason, caption))
        writer.writerow([key, place, reason, "" if cosine is None else f"{cosine:.4f}", caption])
    return text.getvalue()


def read_exclusions(path: str | Path) -> list[Exclusion]:
    """Read a list: CSV with a column "key" and perhaps "place" and "reason", or plain text with one key per line.

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
    matched, elsewhere = Exclusions(), defaultdict[str, list[Exclusion]](list)
    for row in rows:
        if 0 <= row.place < len(images) and images.key(row.place) == row.key:
            matched.reasons[row.place] = row.reason
        else:
            elsewhere[row.key].append(row)
    if elsewhere:
        seen = set[str]()
        for place in range(len(images)):
            if (key := images.key(place)) in elsewhere:
                seen.add(key)
                matched.reasons.setdefault(place, elsewhere[key][0].reason)
        matched.missing = [key for key in elsewhere if key not in seen]
    return matched


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
    """A cell without the apostrophe that kept a spreadsheet from computing it."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
