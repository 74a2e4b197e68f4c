"""Tables of text that the package ships, compressed by xz."""

import lzma
from importlib.resources import files
from importlib.resources.abc import Traversable


def asset(name: str) -> Traversable:
    """A file of the package."""
    return files("declip.data") / "assets" / name


def read_lines(name: str) -> list[str]:
    """The lines of a shipped text."""
    return lzma.decompress(asset(f"{name}.xz").read_bytes()).decode().split("\n")


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of a shipped table by column; see `split_texts` for columns that hold several texts."""
    head, *lines = (line.split("\t") for line in read_lines(f"{name}.tsv"))
    return [dict(zip(head, line, strict=True)) for line in lines]


def split_texts(joined: str) -> list[str]:
    """The texts of a column that holds several."""
    return joined.split("|") if joined else []
