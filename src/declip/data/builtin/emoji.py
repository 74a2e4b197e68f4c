"""`builtin:emoji`: emoji drawn by many designers, with their names and keywords.

Several designers drew the same concepts, so the pairs are real and there is a clean test: a held-out designer, for
classes that training knows and for unseen ones. A table says which drawing shows which emoji, its names and whether it
is held out of training; it is made of the packages' pinned versions by benchmarks/build_emoji.py.
"""

from collections import Counter
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import numpy as np

from declip.data.builtin.fetch import NpmPackages, Packages, read_json
from declip.data.builtin.iconify import credit_of, draw_icon, read_rows, split_texts
from declip.data.builtin.pictures import BuiltinSet, Row, Selection


class Design(NamedTuple):
    """A designer's set: name in keys and tables, npm package, its version, and the sentence that its license asks for.

    A newer version may draw other emoji and so change the test.
    """

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
PACKAGE_OF = {design.key: design.package for design in DESIGNS}
TRAINING = ("noto", "noto-v1", "twemoji", "fxemoji", "emojione-v2")


class Emoji(BuiltinSet):
    """The emoji: in the order of the designers, then as Unicode orders emoji."""

    name, layout, effort = "emoji", 3, "14 MB to fetch, about a minute"
    side = 96  # a view of a 64 px model that shows 44 % of the drawing still has a pixel for each of the model's
    packages = NpmPackages({design.package: design.version for design in DESIGNS})
    keeps_repeated = True  # two countries may have one flag
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
        credit = "; ".join(design.credit for design in DESIGNS if design.key in designs)
        if len(designs) > 1:
            return Selection(rows, credit)
        return Selection(rows, credit, "name", [row["name"] for row in rows])  # one designer: one drawing a class

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
                "keywords": split_texts(emoji["keywords"]),
            }
            for design in PACKAGE_OF
            for emoji in table
            if emoji[design]
        ]

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        file = packages[PACKAGE_OF[row["design"]]].folder / "icons.json"
        return draw_icon(file, row["drawing"], self.side)

    def credits(self, packages: Packages, rows: list[Row]) -> list[str]:
        counts = Counter(row["design"] for row in rows)
        infos = {key: read_json(packages[package].folder / "info.json") for key, package in PACKAGE_OF.items()}
        names = "Names and keywords: emojibase-data 17.0.0 and emojilib 4.0.3, MIT; Unicode CLDR, Unicode License"
        return [*(credit_of(info, counts[key]) for key, info in infos.items()), names]


EMOJI = Emoji()
