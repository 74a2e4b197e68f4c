"""Lists of pairs to leave out: written by `declip app` or `declip data inspect`, or by hand, one key per line."""

import csv
import io
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from declip.data.pair import PairSource, printable
from declip.data.sources.image_source import ImageSource
from declip.errors import UserError

log = logging.getLogger("declip")

COLUMNS = ("key", "place", "reason", "cosine", "caption")
EXCLUDED = "excluded"  # the reason if a list has none
LONGEST_REASON = 80  # characters: counts are kept by reason
LARGEST_LIST = 1 << 30  # bytes of a list
# Beginnings of cells that a spreadsheet evaluates. Such cells are written with an apostrophe before them, which a
# spreadsheet shows as text, and read without it.
FORMULA = re.compile(r"'*[=+\-@\t\r]")


class Exclusion(NamedTuple):
    """A pair of a list: its key, its index in the source (-1 where unknown) and the reason why it is left out."""

    key: str
    place: int = -1
    reason: str = EXCLUDED


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
    try:
        if path.stat().st_size > LARGEST_LIST:
            raise ValueError(f"it has more than {LARGEST_LIST:,} bytes")
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        if "key" in reader.fieldnames:
            rows = [_exclusion(row) for row in reader if row["key"]]
        else:
            rows = [Exclusion(line.strip()) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"The list '{path}' cannot be read: {printable(str(error))}. Pass CSV with a column 'key', or text with "
            "one key per line, in UTF-8."
        ) from error
    if not rows:
        raise UserError(f"The list '{path}' names no pair.")
    return rows


def match_exclusions(source: PairSource, rows: Iterable[Exclusion]) -> dict[int, str]:
    """Find the reasons by index: of the pair at a row's place if that has its key, else of all with its key."""
    images = ImageSource(source)
    reasons: dict[int, str] = {}
    elsewhere: dict[str, str] = {}
    for row in rows:
        if 0 <= row.place < len(images) and images.key(row.place) == row.key:
            reasons[row.place] = row.reason
        else:
            elsewhere.setdefault(row.key, row.reason)
    missing = dict.fromkeys(elsewhere)
    for place in range(len(images)) if elsewhere else ():
        if (key := images.key(place)) in elsewhere:
            missing.pop(key, None)
            reasons.setdefault(place, elsewhere[key])
    if missing:
        first = printable(next(iter(missing)))
        fault = f"{len(missing):,} keys of the list are not in '{source.name}', such as '{first}'."
        if not reasons:
            raise UserError(f"{fault} Use the source that the list was made from.")
        log.warning(fault)
    return reasons


def _exclusion(row: dict[str, str]) -> Exclusion:
    reason = printable(_as_text(row.get("reason", "").strip())[:LONGEST_REASON]) or EXCLUDED
    return Exclusion(_as_text(row["key"]), int(row.get("place", "").strip() or -1), reason)


def _as_text(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) else cell
