"""The built-in image-text sets, as `builtin:NAME`: drawings, photographs and icons, each with names or sentences.

Several designers drew the same emoji and icons, so there is a clean test: held-out designers, for classes that
training knows and, with emoji, for unseen ones. Scripts in scripts/builtin make the tables of chosen drawings.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from declip.data.builtin.fetch import DebianPackage, NpmPackages, Packages, read_json
from declip.data.builtin.pictures import (
    BuiltinSet,
    BuiltinSource,
    Row,
    Selection,
    draw_icon,
    fill_square,
    rasterize_page,
)
from declip.data.pair import BUILTIN_PREFIX
from declip.data.tables import read_rows, split_texts
from declip.errors import UserError, unknown


class Clipart(BuiltinSet):
    """The clip art: by path; the class of a drawing is its title, and several drawings may be of one class."""

    name, layout, effort = "clipart", 2, "25 MB to fetch, about a minute"
    side = 96
    packages = DebianPackage("openclipart-svg", "usr/share/openclipart/svg")
    splits = ("clipart",)

    def credit(self, row: Row) -> str:
        return "Open Clip Art Library 0.18 and its contributors, public domain"

    def select(self, split: str, table: list[Row]) -> Selection:
        return table, "title", ()

    def choose(self, packages: Packages) -> list[Row]:
        rows = ((row, row["key"].partition("/")[0].replace("_", " ")) for row in read_rows("clipart"))
        return [row | {"category": category, "captions": [row["title"]]} for row, category in rows]

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
        return rows, column, names

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


class Design(NamedTuple):
    """A designer's emoji: name in tables, npm package, version (newer ones may draw others), credit for the license."""

    key: str
    package: str
    version: str
    credit: str


DESIGNS = (
    Design("noto", "@iconify-json/noto", "1.2.9", "Noto Emoji by Google, Apache-2.0"),
    Design("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Noto Emoji v1 by Google, Apache-2.0"),
    Design("twemoji", "@iconify-json/twemoji", "1.2.5", "Twemoji by Twitter and contributors, CC-BY-4.0"),
    Design("fxemoji", "@iconify-json/fxemoji", "1.2.2", "FxEmoji by Mozilla, Apache-2.0"),
    Design("emojione-v2", "@iconify-json/emojione", "1.2.3", "EmojiOne v2 by EmojiOne, CC-BY-4.0"),
    Design("emojione-v1", "@iconify-json/emojione-v1", "1.2.3", "EmojiOne v1 by EmojiOne, CC-BY-SA-4.0"),
    Design("openmoji", "@iconify-json/openmoji", "1.2.29", "OpenMoji by the OpenMoji project, CC-BY-SA-4.0"),
    Design("fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", "Fluent Emoji by Microsoft, MIT"),
)
DESIGN = {design.key: design for design in DESIGNS}
TRAINING = ("noto", "noto-v1", "twemoji", "fxemoji", "emojione-v2")

ICONS_PACKAGE = "@iconify/json"
# Held-out sets of icons, one-color and colored, Apache-2.0 and MIT; all others are for training.
SPLIT_OF = {
    **dict.fromkeys(("carbon", "iconoir", "icon-park", "icon-park-solid", "flat-color-icons"), "test"),
    **dict.fromkeys(("bi", "healthicons", "marketeq"), "validation"),
}


class Emoji(BuiltinSet):
    """The emoji: in the order of the designers, then as Unicode orders emoji."""

    name, layout, effort = "emoji", 4, "14 MB to fetch, about a minute"
    side = 96  # a view of a 64 px model that shows 44 % of the drawing still has a pixel for each of the model's
    packages = NpmPackages({design.package: design.version for design in DESIGNS})
    keeps_repeated = True  # two countries may have one flag
    names_by = "Names and keywords: emojibase-data 17.0.0 and emojilib 4.0.3, MIT; Unicode CLDR, Unicode License"
    splits: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "emoji": TRAINING,
        "emoji-share-alike": (*TRAINING, "emojione-v1"),
        "emoji-validation": ("openmoji",),
        "emoji-validation-new": ("openmoji",),
        "emoji-test": ("fluent",),
        "emoji-test-new": ("fluent",),
    }

    def select(self, split: str, table: list[Row]) -> Selection:
        """All drawings by a split's designers of the concepts that training knows, or of those held out of it."""
        designs, new = self.splits[split], split.endswith("-new")
        known = {row["code"] for row in table if row["design"] in TRAINING and not row["held_out"]}
        rows = [r for r in table if r["design"] in designs and (r["held_out"] if new else r["code"] in known)]
        # One designer drew one emoji a class.
        return (rows, None, ()) if len(designs) > 1 else (rows, "name", [row["name"] for row in rows])

    def credit(self, row: Row) -> str:
        return DESIGN[row["design"]].credit

    def choose(self, packages: Packages) -> list[Row]:
        table = read_rows("emoji")
        return [
            {
                "key": f"{design}/{emoji['code']}",
                "design": design,
                "drawing": emoji[design],
                **{column: emoji[column] for column in ("code", "name", "category", "group")},
                "held_out": emoji["held_out"] == "1",
                "captions": [emoji["name"], *split_texts(emoji["names"]), *split_texts(emoji["drawn"])],
            }
            for design in DESIGN
            for emoji in table
            if emoji[design]
        ]

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        return draw_icon(packages[DESIGN[row["design"]].package].folder / "icons.json", row["drawing"], self.side)


class Icons(BuiltinSet):
    """The icons by set, held-out ones first: of two equal drawings the first is kept, so training has no test's."""

    name, layout, effort = "icons", 2, "104 MB to fetch, about ten minutes"
    side = 64  # icons are plain: at 64 px their lines are one to five pixels wide
    packages = NpmPackages({ICONS_PACKAGE: "2.2.535"})
    names_by = "Keywords also by lucide-static 1.62.0 (ISC) and @tabler/icons 3.52.0 (MIT)"
    splits: ClassVar[Mapping[str, str]] = {"icons": "train", "icons-validation": "validation", "icons-test": "test"}

    def select(self, split: str, table: list[Row]) -> Selection:
        """The icons of a split's sets whose names training knows."""
        known = {row["name"] for row in table if row["split"] == "train"}
        rows = [row for row in table if row["split"] == self.splits[split] and row["name"] in known]
        return rows, None if self.splits[split] == "train" else "name", ()

    def credit(self, row: Row) -> str:
        return f"{row['title']} by {row['author']}, {row['licence']}"

    def choose(self, packages: Packages) -> list[Row]:
        infos, rows = read_json(packages[ICONS_PACKAGE].folder / "collections.json"), []
        for icon in read_rows("icons"):
            prefix, captions = icon["key"].split("/")[0], split_texts(icon["captions"])
            info = infos[prefix]
            row = {"key": icon["key"], "split": SPLIT_OF.get(prefix, "train"), "set": prefix, "title": info["name"]}
            row |= {"author": info.get("author", {}).get("name", ""), "licence": license_of(info)}
            rows.append({**row, "name": captions[0], "category": icon["category"], "captions": captions})
        return rows

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        prefix, drawing = row["key"].split("/")
        return draw_icon(packages[ICONS_PACKAGE].folder / f"json/{prefix}.json", drawing, self.side)


EMOJI, ICONS = Emoji(), Icons()


def license_of(info: Mapping[str, Any]) -> str:
    """The SPDX name of a set's license, else its title, from the set's description."""
    license = info.get("license", {})
    return str(license.get("spdx") or license.get("title") or "unknown")


SETS = EMOJI, ICONS, CLIPART, STAMPS
# The set of each source's name.
BUILTINS: dict[str, BuiltinSet] = {split: item for item in SETS for split in item.splits}

# Source names of sets with splits, by split.
BUILTIN_SPLITS: dict[str, dict[str, str]] = {"stamps-kinds": {"train": "stamps-kinds-train", "test": "stamps-kinds"}}


def open_builtin(name: str) -> BuiltinSource:
    """Open one of `BUILTINS`, with or without "builtin:"."""
    name = name.removeprefix(BUILTIN_PREFIX)
    return BuiltinSource(_find(name), name)


def download(name: str, cache: str | Path | None = None, progress: bool = True) -> Path:
    """Download and render the set of one of `BUILTINS`, unless it is there already, and return its folder."""
    split = name.removeprefix(BUILTIN_PREFIX)
    if split not in BUILTINS and Path(name).expanduser().exists():
        raise UserError(f"'{name}' is not a built-in set but a path, which every command takes without a download.")
    return _find(split).download(cache, progress)


def _find(name: str) -> BuiltinSet:
    if name not in BUILTINS:
        raise unknown("built-in set", name, BUILTINS)
    return BUILTINS[name]
