"""Sets of drawings in Iconify's format, JSON with an SVG document's body for each name, and tables that choose some."""

import lzma
from functools import lru_cache
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np

from declip.data.builtin.fetch import read_json
from declip.data.builtin.render import OVERSIZE, draw, fill_square

BOX = {"left": 0, "top": 0, "width": 16, "height": 16}
"""Iconify's defaults."""

read_icons = lru_cache(maxsize=1)(read_json)
"""The set that was read last: drawings are rendered set by set."""


def draw_icon(file: Path, name: str, side: int) -> np.ndarray:
    """Render a drawing of a set that fills the square, its shape kept: uint8 (side, side, 3)."""
    icons = read_icons(file)
    icon = icons["icons"][name]
    box = " ".join(str(icon.get(edge, icons.get(edge, default))) for edge, default in BOX.items())
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{OVERSIZE * side}" height="{OVERSIZE * side}" viewBox="{box}">{icon["body"]}</svg>'
    )
    return fill_square(draw(svg), side)


def table_file(name: str) -> Traversable:
    """The file of a shipped table."""
    return resources.files("declip.data") / "assets" / f"{name}.tsv.xz"


def read_rows(name: str) -> list[dict[str, str]]:
    """The rows of a shipped table by column; see `split_texts` for columns that hold several texts."""
    head, *lines = (line.split("\t") for line in lzma.decompress(table_file(name).read_bytes()).decode().split("\n"))
    return [dict(zip(head, line, strict=True)) for line in lines]


def split_texts(joined: str) -> list[str]:
    """The texts of a column that holds several."""
    return joined.split("|") if joined else []


def license_of(info: dict[str, Any]) -> str:
    """The SPDX name of a set's license, else its title, from the set's description."""
    license = info.get("license", {})
    return str(license.get("spdx") or license.get("title") or "unknown")


def credit_of(info: dict[str, Any], count: int) -> str:
    """Lines with the author, license and source of a set's drawings."""
    author = info.get("author", {})
    return (
        f"{info['name']} by {author.get('name', '')}, {license_of(info)}: {count} drawings\n"
        f"  from {author.get('url', '')}, licence: {info.get('license', {}).get('url', '')}"
    )
