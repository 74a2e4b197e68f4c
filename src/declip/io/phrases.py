"""Pieces of sentences."""

from collections.abc import Iterable


def listed(words: Iterable[object]) -> str:
    """ "a, b and c"."""
    given = [f"{word:,}" if isinstance(word, int) else str(word) for word in words]
    return given[0] if len(given) == 1 else f"{', '.join(given[:-1])} and {given[-1]}" if given else "nothing"


def counted(number: int, word: str) -> str:
    """ "1 run", "2 runs"."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def short_count(number: int) -> str:
    """2000 is "2k", 2500 "2.5k", 1234 "1,234"."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if number >= size and number % (size // 10) == 0:
            return f"{number / size:g}{unit}"
    return f"{number:,}"
