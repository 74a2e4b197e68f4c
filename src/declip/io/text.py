"""How numbers and other people's texts are shown, in the terminal, on the page and on the sheet."""

import regex

from declip.inspection.result import Inspection

_UNSEEN = regex.compile(r"[\p{Cc}\p{Cs}\p{Co}\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Control characters, halves of characters, and what turns the direction of writing: a caption may hold any."""


def shown(text: str, most: int = 160) -> str:
    """A text from the data that can be shown: no control characters, cut off where it is too long."""
    plain = _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text[: most + 1])
    return plain if len(plain) <= most else f"{plain[: most - 1].rstrip()}…"


def about(number: float) -> str:
    """A number to two digits: 1,834 is "1,800", 0.0512 is "0.051"."""
    return f"{float(f'{number:.2g}'):,.0f}" if number >= 10 else f"{number:.2g}"


def plural(count: int, one: str, several: str = "") -> str:
    """ "1 pair", "2,000 pairs"."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def extent(inspection: Inspection) -> str:
    """How much of the source was read."""
    if inspection.whole:
        return (
            f"All {plural(inspection.total, 'pair')} were read." if inspection.total > 1 else "Its one pair was read."
        )
    return f"{inspection.read:,} of {inspection.total:,} pairs were read, drawn with seed {inspection.seed}."


def caution(inspection: Inspection) -> str:
    """What a sample cannot know; empty when the whole was read."""
    if inspection.whole:
        return ""
    both = inspection.read * (inspection.read - 1) / (inspection.total * (inspection.total - 1))
    return (
        f"A sample misses duplicates: of two equal pairs both are in it with a chance of {about(100 * both)} % only. "
        "So the pairs and groups counted here are too few for the whole source, and the couples in the whole a rough "
        "estimate; read all of it (--all) to count them."
    )
