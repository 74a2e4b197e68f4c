"""Writing the tables that the package ships: what `declip.data.tables` reads."""

import lzma
from collections.abc import Iterable
from itertools import takewhile
from operator import eq

from declip.data.tables import split_texts

_LONGEST = ord("~") - ord("0")  # of a shared prefix
_FILTER = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}  # settings for text


def pack(lines: Iterable[str]) -> bytes:
    """Compress lines; in a sorted list only the differences remain, for which xz needs two thirds of the space."""
    coded, before = [], ""
    for line in lines:
        shared = min(len(list(takewhile(bool, map(eq, before, line)))), _LONGEST)
        coded.append(chr(ord("0") + shared) + line[shared:])
        before = line
    return lzma.compress("\n".join(coded).encode(), filters=[_FILTER])


def shorten(captions: str, key: str) -> str:
    """Replace a first caption that the drawing's name starts with by the number of words that the name has more."""
    first, *others = split_texts(captions)
    caption, name = first.split(" "), key.split("/")[1].split("-")
    left = str(len(name) - len(caption)) if name[: len(caption)] == caption else f" {first}"
    return "|".join([left, *others])
