"""`builtin:clipart`, drawings of the Open Clip Art Library, and `builtin:stamps`, Tux Paint's, each with a sentence."""

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from PIL import Image

from declip.data.builtin.fetch import DebianPackage, Packages
from declip.data.builtin.pictures import BuiltinSet, Row, Selection, fill_square, rasterize_page, read_rows, split_texts


class Clipart(BuiltinSet):
    """The clip art: by path; the class of a drawing is its title, and several drawings may be of one class."""

    name, layout, effort = "clipart", 2, "25 MB to fetch, about a minute"
    side = 96
    packages = DebianPackage("openclipart-svg", "usr/share/openclipart/svg")
    splits = ("clipart",)

    def credit(self, row: Row) -> str:
        return "Open Clip Art Library 0.18 and its contributors, public domain"

    def select(self, split: str, table: list[Row]) -> Selection:
        return Selection(table, "title")

    def choose(self, packages: Packages) -> list[Row]:
        rows = read_rows("clipart")
        return [
            row | {"category": row["key"].split("/")[0].replace("_", " "), "captions": [row["title"]]} for row in rows
        ]

    def pixels(self, row: Row, packages: Packages) -> np.ndarray | None:
        path = packages[self.packages.name].folder / row["key"]
        try:
            return rasterize_page(path.read_text(encoding="utf-8"), self.side)
        except (OSError, ValueError):
            return None


class Stamps(BuiltinSet):
    """The stamps: by path; "stamps" and "stamps-photos" by name, "stamps-kinds" in two parts that share no name."""

    name, layout, effort = "stamps", 2, "81 MB to fetch, about a minute"
    side = 128  # half of the stamps are larger than 193
    packages = DebianPackage("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
    splits: ClassVar[Mapping[str, str]] = {
        "stamps": "name",
        "stamps-photos": "name",
        "stamps-kinds": "kind",
        "stamps-kinds-train": "kind",
    }

    def credit(self, row: Row) -> str:
        return "Tux Paint stamps by Bill Kendrick and contributors, GPL-2"

    def select(self, split: str, table: list[Row]) -> Selection:
        """The stamps that have a name, the photographs among them, or one part of those that are of a kind."""
        column = self.splits[split]
        rows = [row for row in table if row[column] and (row["photo"] or split != "stamps-photos")]
        names = sorted({row[column] for row in rows})
        if column == "kind":
            rows = [row for row in rows if row["test"] == (split == "stamps-kinds")]
        return Selection(rows, column, names)

    def choose(self, packages: Packages) -> list[Row]:
        folder, rows = packages[self.packages.name].folder, []
        for row in read_rows("stamps"):
            sentence = (folder / f"{row['key']}.txt").read_text(encoding="utf-8").partition("\n")[0]
            captions = [" ".join(sentence.split()), *split_texts(row["name"])]
            rows.append(row | {"photo": row["photo"] == "1", "test": row["test"] == "1", "captions": captions})
        return rows

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        path = packages[self.packages.name].folder / f"{row['key']}.png"
        with Image.open(path, formats=["PNG"]) as image:
            drawn = image.convert("RGBA")
        # Stamps are cut out; training sees them over white, as all drawings.
        white = Image.new("RGBA", drawn.size, "white")
        return fill_square(Image.alpha_composite(white, drawn).convert("RGB"), self.side)


CLIPART, STAMPS = Clipart(), Stamps()
