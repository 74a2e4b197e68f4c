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


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of a shipped table by column; see `split_texts` for columns that hold several texts."""
    head, *lines = (line.split("\t") for line in unpack(asset(f"{name}.tsv.xz").read_bytes()))
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    for row in rows if "captions" in head else ():
        # A first caption is the number of words that the name has more, or written out after a space.
        first, *others = row["captions"].split("|")
        words = row["key"].split("/")[1].split("-")
        caption = first[1:] if first.startswith(" ") else " ".join(words[: len(words) - int(first)])
        row["captions"] = "|".join([caption, *others])
    return rows


def split_texts(joined: str) -> list[str]:
    """The texts of a column that holds several."""
    return joined.split("|") if joined else []
