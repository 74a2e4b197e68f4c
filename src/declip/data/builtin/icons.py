"""`builtin:icons`: icons by many designers, with their names, categories and keywords.

The same things drawn over and over, named and sorted by their designers. Some designers are kept for measuring, so a
test image is by a held-out designer; its name is one that training knows. A table has the chosen icons, without logos,
further styles and the names of emoji; it is made of the package's pinned version by benchmarks/build_icons.py.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from declip.data.builtin.fetch import NpmPackages, Packages, read_json
from declip.data.builtin.iconify import credit_of, draw_icon, license_of, read_rows, split_texts
from declip.data.builtin.pictures import BuiltinSet, Row, Selection

PACKAGE = "@iconify/json"

TEST = ("carbon", "iconoir", "icon-park", "icon-park-solid", "flat-color-icons")
"""IBM, Luca Burgio, ByteDance and Icons8: one-color and colored, Apache-2.0 and MIT."""

VALIDATION = ("bi", "healthicons", "marketeq")
"""The Bootstrap authors, Resolve to Save Lives and Marketeq: one-color and colored, MIT."""


class Icons(BuiltinSet):
    """The icons: by set, and then in the set's own order; the class of an icon is its name.

    Held-out sets come first: of two equal drawings the first is kept, so that training has none of the test's.
    """

    name, layout, effort = "icons", 1, "104 MB to fetch, about ten minutes"
    side = 64  # icons are plain: at 64 px their lines are one to five pixels wide
    packages = NpmPackages({PACKAGE: "2.2.535"})
    splits: ClassVar[Mapping[str, str]] = {
        "icons": "train",
        "icons-validation": "validation",
        "icons-test": "test",
    }

    def select(self, split: str, table: list[Row]) -> Selection:
        """The icons of a split's sets whose names training knows."""
        known = {row["name"] for row in table if row["split"] == "train"}
        rows = [row for row in table if row["split"] == self.splits[split] and row["name"] in known]
        sets = {row["set"]: f"{row['title']} by {row['author']}, {row['licence']}" for row in rows}
        return Selection(rows, "; ".join(sets.values()), None if self.splits[split] == "train" else "name")

    def choose(self, packages: Packages) -> list[Row]:
        infos, rows = _infos(packages), []
        for icon in read_rows("icons"):
            prefix = icon["key"].split("/")[0]
            captions = split_texts(icon["captions"])
            rows.append(
                {
                    "key": icon["key"],
                    "split": split_of(prefix),
                    "set": prefix,
                    "title": infos[prefix]["name"],
                    "author": infos[prefix].get("author", {}).get("name", ""),
                    "licence": license_of(infos[prefix]),
                    "name": captions[0],
                    "category": icon["category"],
                    "captions": captions,
                    "keywords": split_texts(icon["keywords"]),
                }
            )
        return rows

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        prefix, drawing = row["key"].split("/")
        return draw_icon(packages[PACKAGE].folder / f"json/{prefix}.json", drawing, self.side)

    def credits(self, packages: Packages, rows: list[Row]) -> list[str]:
        infos, counts = _infos(packages), Counter(row["set"] for row in rows)
        return [
            *(credit_of(infos[prefix], count) for prefix, count in sorted(counts.items())),
            "Keywords also by lucide-static 1.62.0 (ISC) and @tabler/icons 3.52.0 (MIT)",
        ]


ICONS = Icons()


def _infos(packages: Packages) -> dict[str, Any]:
    return read_json(packages[PACKAGE].folder / "collections.json")


def split_of(prefix: str) -> str:
    """The split that a set belongs to: "train", "validation" or "test"."""
    return "test" if prefix in TEST else "validation" if prefix in VALIDATION else "train"
