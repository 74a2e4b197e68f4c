"""Files that the package ships, such as texts compressed by xz."""

import lzma
from importlib.resources import files
from importlib.resources.abc import Traversable


def asset(name: str) -> Traversable:
    """A file of the package."""
    return files("declip.data") / "assets" / name


def read_lines(name: str) -> list[str]:
    """The lines of a shipped text."""
    packed = asset(f"{name}.xz").read_bytes()
    text = lzma.decompress(packed).decode()
    return text.split("\n")
