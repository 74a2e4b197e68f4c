"""The drawings of one designer, and which of them shows which emoji."""

import re
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from declip.data.emoji_concepts import code_of, read_json, squash

BOX = ("left", "top", "width", "height")


class IconSet:
    """The drawings of one designer, in Iconify's format.

    Args:
        folder: An unpacked `@iconify-json` package, or the folder `json` of `@iconify/json`.
        file: The set's file there.
    """

    def __init__(self, folder: Path, file: str = "icons.json") -> None:
        data = read_json(folder / file)
        self.prefix: str = data["prefix"]
        self.box = {"left": 0, "top": 0, "width": 16, "height": 16} | {n: data[n] for n in BOX if n in data}
        self.styles: tuple[str, ...] = tuple(style for style in data.get("suffixes", ()) if style)
        self.categories: dict[str, list[str]] = data.get("categories", {})
        self.icons: dict[str, dict[str, Any]] = {n: i for n, i in data["icons"].items() if not i.get("hidden")}
        self.aliases: dict[str, dict[str, Any]] = data.get("aliases", {})
        self._same: dict[str, list[str]] = {}
        for name, alias in self.aliases.items():
            if alias.keys() == {"parent"}:
                self._same.setdefault(alias["parent"], []).append(name)
        chars = folder / "chars.json"
        self.chars: dict[str, str] = read_json(chars) if chars.exists() else {}

    def other_names(self, icon: str) -> list[str]:
        """Other names of the same drawing, neither turned nor mirrored."""
        return self._same.get(icon, [])

    def svg(self, name: str, side: int) -> str:
        """The drawing as an SVG document of `side` by `side` pixels, its shape kept."""
        icon = self.icons[name]
        box = " ".join(str(icon.get(name, self.box[name])) for name in BOX)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{side}" height="{side}" viewBox="{box}">{icon["body"]}</svg>'
        )


def corrections(prefix: str) -> dict[str, str | None]:
    """Drawings whose name tells the wrong emoji or none: the right code, or None for one that is damaged.

    Args:
        prefix: The set's prefix.

    Returns:
        Code by drawing; empty for a set whose names are right.
    """
    file = resources.files("declip.data") / "assets" / f"{prefix}.tsv"
    if not file.is_file():
        return {}
    rows = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines())
    return {name: None if emoji == "-" else code_of(emoji) for name, emoji in rows}


def charted_names(sets: Iterable[IconSet], codes: Iterable[str]) -> dict[str, str]:
    """Codes by squashed name, from the sets that come with a table of code points."""
    known = set(codes)
    layer: dict[str, str] = {}
    for icons in sets:
        for char, name in icons.chars.items():
            if (code := code_of(char)) in known:
                for other in (name, *icons.other_names(name)):
                    layer.setdefault(squash(other), code)
    return layer


def match(icons: IconSet, codes: Iterable[str], layers: list[dict[str, str]]) -> dict[str, str]:
    """Find which drawing shows which emoji.

    By the set's own table of code points or, where it has none, by name: all drawings' names are looked up in a layer
    before the next, more doubtful layer is tried, and their own names before their aliases.

    Args:
        icons: The set.
        codes: The concepts' codes.
        layers: Codes by squashed name, most trustworthy first.

    Returns:
        Drawing by code; a drawing shows one emoji, an emoji has one drawing.
    """
    fixed = corrections(icons.prefix)
    free, left = set(codes), dict.fromkeys(name for name in icons.icons if name not in fixed)
    found: dict[str, str] = {}

    def take(code: str | None, name: str) -> None:
        if code in free and code is not None:
            found[code] = name
            free.discard(code)
            left.pop(name, None)

    for name in icons.icons:
        take(fixed.get(name), name)
    for char, name in icons.chars.items():
        if name in left:
            take(code_of(char), name)
    for layer in layers if not icons.chars else ():
        for names_of in (lambda name: [name], icons.other_names):
            for name in list(left):
                keys = [squash(re.sub(r"^flag-for-(flag-)?", "flag-", other)) for other in names_of(name)]
                take(next((layer[key] for key in keys if layer.get(key) in free), None), name)
    return found
