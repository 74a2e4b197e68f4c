"""The shipped tables of drawings, compressed by xz."""

import lzma
from importlib.resources import files
from importlib.resources.abc import Traversable


def asset(name: str) -> Traversable:
    """A file of the package."""
    return files("declip_sets") / "assets" / name


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of a shipped table by column; see `split_texts` for columns of several texts."""
    content = asset(f"{name}.tsv.xz").read_bytes()
    lines = lzma.decompress(content).decode().split("\n")
    columns = lines[0].split("\t")
    rows = []
    for line in lines[1:]:
        cells = line.split("\t")
        rows.append(dict(zip(columns, cells, strict=True)))
    return rows


def split_texts(joined: str) -> list[str]:
    """The texts of a column that holds several."""
    return joined.split("|") if joined else []
