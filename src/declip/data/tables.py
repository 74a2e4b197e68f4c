"""Tables of text that the package ships: lines of which each leaves out what it shares with the one before, in xz."""

import lzma
from importlib.resources import files
from importlib.resources.abc import Traversable


def asset(name: str) -> Traversable:
    """A file of the package."""
    return files("declip.data") / "assets" / name


def unpack(packed: bytes) -> list[str]:
    """The lines that scripts/builtin compressed."""
    lines, before = [], ""
    for coded in lzma.decompress(packed).decode().split("\n"):
        before = before[: ord(coded[0]) - ord("0")] + coded[1:]
        lines.append(before)
    return lines
