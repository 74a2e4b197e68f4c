"""Lists of pairs to leave out, which `declip app` and `declip data inspect` write: a JSON object on each line."""

import json
from collections.abc import Iterable
from pathlib import Path

from declip.data.pair import PairSource, printable
from declip.data.sources.open import ImageSource
from declip.errors import UserError

LONGEST_REASON = 80  # characters: counts are kept by reason
LARGEST_LIST = 1 << 30  # bytes of a list


def write_exclusions(rows: Iterable[tuple[str, int, str, float | None, str]]) -> str:
    """A list of rows with a pair's key, its place in the source, the reason, and what a reader wants to see."""
    names = ("key", "place", "reason", "cosine", "caption")
    return "".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows)


def read_exclusions(path: str | Path, source: PairSource) -> dict[int, str]:
    """Read the reasons of a list by place; raises `UserError` unless the source has the list's keys there."""
    path, keys = Path(path).expanduser(), ImageSource(source)
    try:
        if path.stat().st_size > LARGEST_LIST:
            raise ValueError(f"it has more than {LARGEST_LIST:,} bytes")
        given = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        rows = [(str(row["key"]), int(row["place"]), printable(str(row["reason"])[:LONGEST_REASON])) for row in given]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(
            f"The list '{path}' cannot be read: {printable(str(error))}. Pass one that `declip app` or `declip data "
            'inspect --exclude` wrote: {"key": …, "place": …, "reason": …} on each line.'
        ) from error
    if not rows:
        raise UserError(f"The list '{path}' names no pair.")
    for key, place, _ in rows:
        if not 0 <= place < len(source) or keys.key(place) != key:
            raise UserError(
                f"The list '{path}' has '{printable(key)}' at place {place}, and '{source.name}' does not. Use the "
                "source that the list was made from, unchanged, or make the list again."
            )
    return {place: reason for _, place, reason in rows}
