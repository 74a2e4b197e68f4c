"""The built-in sets, opened as `builtin:NAME`: emoji, icons, clip art and stamps.

Several designers drew the same emoji and icons, so there is a clean test: held-out designers, for
classes that training knows and, with emoji, for unseen ones. The folder scripts/ makes the tables
of emoji and icons.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from declip.data.columns import DEFAULT, Columns
from declip_sets.drawing import draw_icon, fill_square, rasterize_page
from declip_sets.fetch import DebianPackage, NpmPackages, Packages, read_json
from declip_sets.pictures import BuiltinSet, BuiltinSource, Cache, Row, Selection
from declip_sets.tables import read_rows, split_texts


class Clipart(BuiltinSet):
    """Clip art; the class of a drawing is its title, and several drawings may be of one class."""

    name = "clipart"
    layout = 2
    effort = "25 MB to fetch, about a minute"
    side = 96
    packages = DebianPackage("openclipart-svg", "usr/share/openclipart/svg")
    splits = ("clipart",)

    def credit(self, row: Row) -> str:
        return "Open Clip Art Library 0.18 and its contributors, public domain"

    def select(self, split: str, table: list[Row]) -> Selection:
        return Selection(table, "title")

    def choose(self, packages: Packages) -> list[Row]:
        rows = []
        for row in read_rows("clipart"):
            folder = row["key"].partition("/")[0]
            category = folder.replace("_", " ")
            captions = [row["title"]]
            rows.append({**row, "category": category, "captions": captions})
        return rows

    def pixels(self, row: Row, packages: Packages) -> np.ndarray | None:
        path = packages[self.packages.name].folder / row["key"]
        try:
            svg = path.read_text(encoding="utf-8")
            return rasterize_page(svg, self.side)
        except (OSError, ValueError):
            return None


class Stamps(BuiltinSet):
    """Tux Paint's stamps: by name, and by kind in two parts that have no name in common."""

    name = "stamps"
    layout = 2
    effort = "81 MB to fetch, about a minute"
    side = 128  # half of the stamps are larger than 193
    packages = DebianPackage("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
    splits: ClassVar[Mapping[str, str]] = {  # the column of the classes
        "stamps": "name",
        "stamps-photos": "name",
        "stamps-kinds": "kind",
        "stamps-kinds-train": "kind",
    }

    def credit(self, row: Row) -> str:
        return "Tux Paint stamps by Bill Kendrick and contributors, GPL-2"

    def other_splits(self, split: str) -> Mapping[str, str]:
        return {"train": "stamps-kinds-train"} if split == "stamps-kinds" else {}

    def select(self, split: str, table: list[Row]) -> Selection:
        """The stamps with a name, the photographs among them, or one part of those of a kind."""
        column = self.splits[split]
        rows = [row for row in table if row[column]]
        if split == "stamps-photos":
            rows = [row for row in rows if row["photo"]]
        names = sorted({row[column] for row in rows})
        if column == "kind":
            test = split == "stamps-kinds"
            rows = [row for row in rows if row["test"] == test]
        return Selection(rows, column, names)

    def choose(self, packages: Packages) -> list[Row]:
        folder = packages[self.packages.name].folder
        rows = []
        for row in read_rows("stamps"):
            text = (folder / f"{row['key']}.txt").read_text(encoding="utf-8")
            sentence = text.partition("\n")[0]
            captions = [" ".join(sentence.split()), *split_texts(row["name"])]
            flags = {"photo": row["photo"] == "1", "test": row["test"] == "1"}
            rows.append({**row, **flags, "captions": captions})
        return rows

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        path = packages[self.packages.name].folder / f"{row['key']}.png"
        with Image.open(path, formats=["PNG"]) as image:
            drawn = image.convert("RGBA")
        # Stamps are cut out; training sees them over white, as all drawings.
        white = Image.new("RGBA", drawn.size, "white")
        page = Image.alpha_composite(white, drawn)
        return fill_square(page.convert("RGB"), self.side)


class Design(NamedTuple):
    """A designer's emoji; newer versions of a package may draw others."""

    key: str  # in tables
    package: str
    version: str
    credit: str  # author and license


NOTO = "Noto Emoji by Google, Apache-2.0"
NOTO_V1 = "Noto Emoji v1 by Google, Apache-2.0"
TWEMOJI = "Twemoji by Twitter and contributors, CC-BY-4.0"
FXEMOJI = "FxEmoji by Mozilla, Apache-2.0"
EMOJIONE_V2 = "EmojiOne v2 by EmojiOne, CC-BY-4.0"
EMOJIONE_V1 = "EmojiOne v1 by EmojiOne, CC-BY-SA-4.0"
OPENMOJI = "OpenMoji by the OpenMoji project, CC-BY-SA-4.0"
FLUENT = "Fluent Emoji by Microsoft, MIT"

DESIGNS = (
    Design("noto", "@iconify-json/noto", "1.2.9", NOTO),
    Design("noto-v1", "@iconify-json/noto-v1", "1.2.5", NOTO_V1),
    Design("twemoji", "@iconify-json/twemoji", "1.2.5", TWEMOJI),
    Design("fxemoji", "@iconify-json/fxemoji", "1.2.2", FXEMOJI),
    Design("emojione-v2", "@iconify-json/emojione", "1.2.3", EMOJIONE_V2),
    Design("emojione-v1", "@iconify-json/emojione-v1", "1.2.3", EMOJIONE_V1),
    Design("openmoji", "@iconify-json/openmoji", "1.2.29", OPENMOJI),
    Design("fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", FLUENT),
)
DESIGN = {design.key: design for design in DESIGNS}
TRAINING = ("noto", "noto-v1", "twemoji", "fxemoji", "emojione-v2")


class Emoji(BuiltinSet):
    """Emoji, in the order of the designers, then as Unicode orders emoji."""

    name = "emoji"
    layout = 4
    effort = "14 MB to fetch, about a minute"
    # A view of a 64 px model that shows 44 % of the drawing has a pixel for each of the model's.
    side = 96
    packages = NpmPackages({design.package: design.version for design in DESIGNS})
    keeps_repeated = True  # two countries may have one flag
    names_by = (
        "Names and keywords: emojibase-data 17.0.0 and emojilib 4.0.3, MIT; "
        "Unicode CLDR, Unicode License"
    )
    splits: ClassVar[Mapping[str, tuple[str, ...]]] = {  # the designers
        "emoji": TRAINING,
        "emoji-share-alike": (*TRAINING, "emojione-v1"),
        "emoji-validation": ("openmoji",),
        "emoji-validation-new": ("openmoji",),
        "emoji-test": ("fluent",),
        "emoji-test-new": ("fluent",),
    }

    def credit(self, row: Row) -> str:
        return DESIGN[row["design"]].credit

    def select(self, split: str, table: list[Row]) -> Selection:
        """All drawings by a split's designers of concepts that training knows, or held out."""
        designs = self.splits[split]
        rows = [row for row in table if row["design"] in designs]
        if split.endswith("-new"):
            rows = [row for row in rows if row["held_out"]]
        else:
            known = self._known_codes(table)
            rows = [row for row in rows if row["code"] in known]
        if len(designs) > 1:
            return Selection(rows)
        # One designer drew one emoji a class.
        return Selection(rows, "name", [row["name"] for row in rows])

    def _known_codes(self, table: list[Row]) -> set[str]:
        """The codes of the concepts that training knows."""
        trained = (row for row in table if row["design"] in TRAINING)
        return {row["code"] for row in trained if not row["held_out"]}

    def choose(self, packages: Packages) -> list[Row]:
        table = read_rows("emoji")
        rows = []
        for design in DESIGN:
            for emoji in table:
                if emoji[design]:
                    rows.append(self._row(design, emoji))
        return rows

    def _row(self, design: str, emoji: Mapping[str, str]) -> Row:
        names = split_texts(emoji["names"])
        drawn = split_texts(emoji["drawn"])
        return {
            "key": f"{design}/{emoji['code']}",
            "design": design,
            "drawing": emoji[design],
            "code": emoji["code"],
            "name": emoji["name"],
            "category": emoji["category"],
            "group": emoji["group"],
            "held_out": emoji["held_out"] == "1",
            "captions": [emoji["name"], *names, *drawn],
        }

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        package = packages[DESIGN[row["design"]].package]
        return draw_icon(package.folder / "icons.json", row["drawing"], self.side)


ICONS_PACKAGE = "@iconify/json"
# Held-out sets of icons, one-color and colored, Apache-2.0 and MIT; all others are for training.
SPLIT_OF = {
    "carbon": "test",
    "iconoir": "test",
    "icon-park": "test",
    "icon-park-solid": "test",
    "flat-color-icons": "test",
    "bi": "validation",
    "healthicons": "validation",
    "marketeq": "validation",
}


class Icons(BuiltinSet):
    """Icons by set, held-out ones first.

    Of two equal drawings the first is kept, so training has none of the test's.
    """

    name = "icons"
    layout = 3
    effort = "104 MB to fetch, about ten minutes"
    side = 64  # icons are plain: at 64 px their lines are one to five pixels wide
    packages = NpmPackages({ICONS_PACKAGE: "2.2.535"})
    names_by = "Keywords also by lucide-static 1.62.0 (ISC) and @tabler/icons 3.52.0 (MIT)"
    splits: ClassVar[Mapping[str, str]] = {
        "icons": "train",
        "icons-validation": "validation",
        "icons-test": "test",
    }

    def select(self, split: str, table: list[Row]) -> Selection:
        """The icons of a split's sets whose names training knows."""
        part = self.splits[split]
        known = {row["name"] for row in table if row["split"] == "train"}
        rows = [row for row in table if row["split"] == part]
        rows = [row for row in rows if row["name"] in known]
        return Selection(rows, None if part == "train" else "name")

    def credit(self, row: Row) -> str:
        return f"{row['title']} by {row['author']}, {row['license']}"

    def choose(self, packages: Packages) -> list[Row]:
        infos = read_json(packages[ICONS_PACKAGE].folder / "collections.json")
        return [self._row(icon, infos) for icon in read_rows("icons")]

    def _row(self, icon: Mapping[str, str], infos: Mapping[str, Any]) -> Row:
        prefix = icon["key"].split("/")[0]
        info = infos[prefix]
        captions = split_texts(icon["captions"])
        return {
            "key": icon["key"],
            "split": SPLIT_OF.get(prefix, "train"),
            "set": prefix,
            "title": info["name"],
            "author": info.get("author", {}).get("name", ""),
            "license": license_of(info),
            "name": captions[0],
            "category": icon["category"],
            "captions": captions,
        }

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        prefix, drawing = row["key"].split("/")
        file = packages[ICONS_PACKAGE].folder / f"json/{prefix}.json"
        return draw_icon(file, drawing, self.side)


def license_of(info: Mapping[str, Any]) -> str:
    """The SPDX name of a set's license, else its title, from the set's description."""
    license = info.get("license", {})
    return str(license.get("spdx") or license.get("title") or "unknown")


def _by_source(sets: Iterable[BuiltinSet]) -> dict[str, BuiltinSet]:
    found = {}
    for each in sets:
        for split in each.splits:
            found[split] = each
    return found


EMOJI = Emoji()
ICONS = Icons()
CLIPART = Clipart()
STAMPS = Stamps()
# The set of each source's name.
SET_OF = _by_source((EMOJI, ICONS, CLIPART, STAMPS))


def open_set(name: str, columns: Columns = DEFAULT) -> BuiltinSource:
    """Open `builtin:NAME`; the sets have no columns to choose."""
    return BuiltinSource(SET_OF[name], name)


def download(name: str, cache: Cache = None, progress: bool = True) -> Path:
    """Download and render the set of `builtin:NAME`, once, and return its folder."""
    return SET_OF[name].download(cache, progress)
