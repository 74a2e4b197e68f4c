"""Numbers, durations and untrusted text for the terminal, pages and tables."""

import re
from collections.abc import Iterable

import regex

# Control characters, line ends, surrogates and marks of writing direction.
_UNSEEN = regex.compile(r"[\p{Cc}\p{Cs}\p{Co}\p{Zl}\p{Zp}\u200e\u200f\u202a-\u202e\u2066-\u2069]")

# Beginnings of cells that a spreadsheet evaluates; an apostrophe before them makes them text.
FORMULA = re.compile(r"'*[=+\-@\t\r]")


def sanitize(text: str, most: int = 160) -> str:
    """Replace control characters in a text from the data, and truncate it to `most` characters."""
    plain = _UNSEEN.sub("\N{REPLACEMENT CHARACTER}", text[: most + 1])
    if len(plain) <= most:
        return plain
    return f"{plain[: most - 1].rstrip()}…"


def round_two_digits(number: float) -> str:
    """Format a number with two digits: 1,834 is "1,800", 0.0512 is "0.051"."""
    rounded = f"{number:.2g}"
    if number >= 10:
        return f"{float(rounded):,.0f}"
    return rounded


def plural(count: int, one: str) -> str:
    """Format a count with a noun: "1 pair", "2,000 pairs"."""
    return f"{count:,} {one if count == 1 else one + 's'}"


def join_words(words: Iterable[object]) -> str:
    """Join words: "a, b and c"."""
    given = [f"{word:,}" if isinstance(word, int) else str(word) for word in words]
    if not given:
        return "nothing"
    *first, last = given
    if not first:
        return last
    return f"{', '.join(first)} and {last}"


def short_count(number: int) -> str:
    """Abbreviate a round number: 2000 is "2k", 2500 "2.5k", 1234 "1,234"."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if number >= size and number % (size // 10) == 0:
            return f"{number / size:g}{unit}"
    return f"{number:,}"


def percent(fraction: float) -> str:
    """Format a fraction in percent, small ones with more digits: 0.0008 is "0.08 %", 0.367 is "36.7 %"."""
    digits = ".2f" if fraction < 0.01 else ".1f"
    if fraction and fraction < 0.001:
        digits = ".2g"
    return f"{100 * fraction:{digits}} %"


def duration(seconds: float) -> str:
    """Format seconds: "43 s", "5 min 12 s", "3 h 5 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    words = f"{rest} s"
    if minutes:
        words = f"{minutes} min {rest} s"
    if hours:
        words = f"{hours} h {minutes} min"
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def one_line(error: BaseException, longest: int = 300) -> str:
    """Format the message of an error on one line, or its class if the message is empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= longest:
        return text
    return f"{text[:longest]} …"


def plain_cell(cell: str) -> str:
    """A cell that a spreadsheet does not compute as a formula."""
    if FORMULA.match(cell):
        return f"'{cell}"
    return cell
