"""Tables of text that the package ships: lines of which each leaves out what it shares with the one before, in xz."""

import lzma
from collections.abc import Iterable
from importlib.resources import files
from importlib.resources.abc import Traversable
from itertools import takewhile
from operator import eq

_LONGEST = ord("~") - ord("0")  # of a shared prefix
_FILTER = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 4, "pb": 0}  # settings for text


def asset(name: str) -> Traversable:
    """A file of the package."""
    return files("declip.data") / "assets" / name


def pack(lines: Iterable[str]) -> bytes:
    """Compress lines; in a sorted list only the differences remain, for which xz needs two thirds of the space."""
    coded, before = [], ""
    for line in lines:
        shared = min(len(list(takewhile(bool, map(eq, before, line)))), _LONGEST)
        coded.append(chr(ord("0") + shared) + line[shared:])
        before = line
    return lzma.compress("\n".join(coded).encode(), filters=[_FILTER])


def unpack(packed: bytes) -> list[str]:
    """The lines that `pack` compressed."""
    lines, before = [], ""
    for coded in lzma.decompress(packed).decode().split("\n"):
        before = before[: ord(coded[0]) - ord("0")] + coded[1:]
        lines.append(before)
    return lines
