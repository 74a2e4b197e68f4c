"""`builtin:stamps`: the stamps of Tux Paint, each with a sentence.

Drawings and photographs cut out on white: another source than emoji and icons, for transfer.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from declip.data.builtin.fetch import DebianPackage, Packages
from declip.data.builtin.pictures import BuiltinSet, Row, Selection
from declip.data.builtin.render import fill_square

LICENSE = "GPL-2"
CREDIT = f"Tux Paint stamps by Bill Kendrick and contributors, {LICENSE}"


class Stamps(BuiltinSet):
    """The stamps: by path; "stamps" and "stamps-photos" by name, "stamps-kinds" in two parts that share no name."""

    name, layout, effort = "stamps", 1, "81 MB to fetch, about a minute"
    side = 128  # half of the stamps are larger than 193
    packages = DebianPackage("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps")
    splits: ClassVar[Mapping[str, str]] = {
        "stamps": "name",
        "stamps-photos": "name",
        "stamps-kinds": "kind",
        "stamps-kinds-train": "kind",
    }

    def select(self, split: str, table: list[Row]) -> Selection:
        """The stamps that have a name, the photographs among them, or one part of those that are of a kind."""
        column = self.splits[split]
        rows = [row for row in table if row[column] and (row["photo"] or split != "stamps-photos")]
        names = sorted({row[column] for row in rows})
        if column == "kind":
            rows = [row for row in rows if row["test"] == (split == "stamps-kinds")]
        return Selection(rows, CREDIT, column, names)

    def choose(self, packages: Packages) -> list[Row]:
        return read_stamps(packages[self.packages.name].folder)

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        path = packages[self.packages.name].folder / f"{row['key']}.png"
        with Image.open(path, formats=["PNG"]) as image:
            drawn = image.convert("RGBA")
        white = Image.new("RGBA", drawn.size, "white")
        return fill_square(Image.alpha_composite(white, drawn).convert("RGB"), self.side)

    def credits(self, packages: Packages, rows: list[Row]) -> list[str]:
        return [f"{len(rows)} images: {CREDIT}, https://www.gnu.org/licenses/old-licenses/gpl-2.0.html"]


STAMPS = Stamps()

KINDS = {
    "animals": "animal",
    "clothes": "piece of clothing",
    "food": "food",
    "hobbies": "musical instrument",
    "household": "household object",
    "military": "military object",
    "people": "person or part of a body",
    "plants": "plant",
    "seasonal": "holiday decoration",
    "space": "planet or spacecraft",
    "sports": "piece of sports equipment",
    "town": "building or road sign",
    "vehicles": "vehicle",
}
"""Class name by folder. Letters, coins and chess men ("symbols") are no one kind; two folders are too small."""

NAME = re.compile(r"(?:An?|The) (?:pair of )?(.+)")
LONGEST_NAME = 3
"""Words. Longer ones tell a story."""

DRAWN_FOLDERS = {"cartoon", "symbols", "roadsigns", "flags", "hanukkah", "easter", "newyears"}
DRAWN = frozenset((
    "lightningbolt", "echidna", "star", "blackcat", "spider", "bat_left", "inukshuk-outline", "lamp", "mug", "glass",
    "birch", "tooth", "hedgehog", "lens_flare", "highlighter", "tree", "ghost", "bow", "eye", "skull", "pizza",
    "hard_candy", "stocking", "toilet", "xmas_tp_bulb", "rubberduck", "stripedfish", "Santa", "santahat", "button",
    "7spoke256", "t_jacket", "t_pants", "t_shirt", "t_scarf", "t_glove", "t_baseballcap", "t_sock", "t_poloshirt",
    "t_tshirt", "fly", "sedan_police",
))  # fmt: skip
"""Stamps that are drawn though their folder does not say so, found by looking at all."""

TEST_FRACTION = 0.3
SALT = "stamps"


def read_stamps(folder: Path) -> list[Row]:
    """Rows of all stamps that have an image and a sentence, by path, from the package's folder `stamps`."""
    rows: list[Row] = []
    texts = {text.relative_to(folder).with_suffix("").as_posix(): text for text in folder.rglob("*.txt")}
    for key, text in sorted(texts.items()):
        sentence = " ".join(text.read_text(encoding="utf-8").partition("\n")[0].split())
        if not sentence or not text.with_suffix(".png").is_file():
            continue
        *folders, stem = key.split("/")
        name = "" if folders[0] == "symbols" else name_of(sentence)
        # Stamps that were vectors first are drawings.
        drawn = DRAWN_FOLDERS & {*folders} or stem in DRAWN or text.with_suffix(".svg").is_file()
        rows.append(
            {
                "key": key,
                "name": name,
                "kind": KINDS.get(folders[0], ""),
                "photo": not drawn,
                "licence": LICENSE,
                "captions": [sentence, name] if name else [sentence],
                "keywords": [folder.replace("_", " ") for folder in folders],
            }
        )
    test = _test_keys(rows)
    return [row | {"test": row["key"] in test} for row in rows]


def name_of(sentence: str) -> str:
    """The thing that an English sentence names: "A koala." gives "koala", "Say cheese!" nothing."""
    first = re.split(r"(?<=[.!?])\s|—| \(|[,;:]", sentence)[0].rstrip(".!? ")
    match = NAME.fullmatch(re.sub(r"[“”\"]", "", first))
    return match[1] if match and len(match[1].split()) <= LONGEST_NAME else ""


def _test_keys(rows: list[Row]) -> set[str]:
    """Keys of the test stamps: of every kind about `TEST_FRACTION`, stamps of one name or numbered alike together."""
    groups: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        stem = re.split(r"[-_\d]", row["key"].rsplit("/", 1)[-1].lower())[0]
        groups[row["kind"]][row["name"].lower() or stem].append(row["key"])
    test: set[str] = set()
    for kind, members in groups.items():
        wanted = round(TEST_FRACTION * sum(map(len, members.values())))
        for group in sorted(members, key=lambda name: sha256(f"{SALT}:{kind}:{name}".encode()).digest()):
            if len(members[group]) <= wanted:
                test.update(members[group])
                wanted -= len(members[group])
    return test
