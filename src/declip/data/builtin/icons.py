"""`builtin:icons`: icons by many designers, with their names, categories and keywords.

The same things drawn over and over, named and sorted by their designers. Some designers are kept for measuring, so a
test image is by a held-out designer; its name is one that training knows.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from declip.data.builtin.emoji import (
    TEXT_PACKAGES,
    Concept,
    IconSet,
    distinct,
    group_of,
    icon_set,
    is_held_out,
    read_concepts,
    squash,
    tidy,
)
from declip.data.builtin.fetch import NpmPackages, Packages, read_json
from declip.data.builtin.pictures import BuiltinSet, Row, Selection
from declip.data.builtin.render import OVERSIZE, rasterize
from declip.data.text.synonyms import is_word

PACKAGE = "@iconify/json"
TAGS = {"lucide-static": "1.62.0", "@tabler/icons": "3.52.0"}
"""Packages that say more about an icon of a name than its set does; version by name."""


class Icons(BuiltinSet):
    """The icons: by set, and then in the set's own order; the class of an icon is its name."""

    name, layout, effort = "icons", 1, "112 MB to fetch, about ten minutes"
    side = 64  # icons are plain: at 64 px their lines are one to five pixels wide
    # The names of icons are the classes of the test, and so must not change under it.
    packages = NpmPackages({PACKAGE: "2.2.535", **TAGS, **TEXT_PACKAGES}, patience=3600)
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
        """Choose the icons.

        Held-out sets first: of two equal drawings the first is kept, so that training has none of the test's.
        """
        chosen, infos = choose(packages), _infos(packages)
        order = sorted(chosen, key=lambda prefix: (("test", "validation", "train").index(split_of(prefix)), prefix))
        return [icon.row(prefix, infos[prefix]) for prefix in order for icon in chosen[prefix]]

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        prefix, drawing = row["key"].split("/")
        icons = icon_set(packages[PACKAGE].folder / "json", f"{prefix}.json")
        return rasterize(icons.svg(drawing, OVERSIZE * self.side), self.side)

    def notice(self, packages: Packages, rows: list[Row]) -> str:
        infos, version = _infos(packages), self.packages.versions[PACKAGE]
        lines = [
            "The drawings in this folder belong to others. Show the line of its set wherever you show a drawing.",
            f"All were rendered at {self.side} px over white, margins cut off, from {PACKAGE} {version}.",
            "",
        ]
        for prefix, count in sorted(Counter(row["set"] for row in rows).items()):
            info = infos[prefix]
            author = info.get("author", {})
            lines += [
                f"{info['name']} by {author.get('name', '')}, {license_of(info)}: {count} drawings",
                f"  from {author.get('url', '')}, licence: {info.get('license', {}).get('url', '')}",
            ]
        lines += ["", "Keywords: " + ", ".join(f"{name} {version}" for name, version in TAGS.items()) + " (ISC, MIT)"]
        return "\n".join(lines) + "\n"


ICONS = Icons()


def _infos(packages: Packages) -> dict[str, Any]:
    return read_json(packages[PACKAGE].folder / "collections.json")


# Sets: prefixes of `@iconify/json` 2.2.535. A set that a later version adds is trained on, so the version is fixed.

TEST = ("carbon", "iconoir", "icon-park", "icon-park-solid", "flat-color-icons")
"""IBM, Luca Burgio, ByteDance and Icons8: one-color and colored, Apache-2.0 and MIT."""

VALIDATION = ("bi", "healthicons", "marketeq")
"""The Bootstrap authors, Resolve to Save Lives and Marketeq: one-color and colored, MIT."""

LEFT_OUT = {
    "old version or further weight": (
        "fa", "fa-solid", "fa-regular", "fa-brands", "fa6-solid", "fa6-regular", "fa6-brands", "bx", "bxs", "bxl",
        "ic", "material-symbols-light", "feather", "heroicons-outline", "heroicons-solid", "pepicons",
        "pepicons-print", "mono-icons", "streamline-guidance",
    ),
    # Mostly other companies' trademarks, though their category does not say so.
    "logos": (
        "devicon", "devicon-line", "devicon-original", "devicon-plain", "skill-icons", "vscode-icons",
        "material-icon-theme", "file-icons", "catppuccin", "gcp", "unjs", "k8s", "academicons", "ginetex",
    ),
    "flags": ("flag", "circle-flags", "flagpack", "cif"),
    "emoji": ("fluent-emoji",),
    "names do not read as words": ("whh", "medical-icon", "wi"),
    "designer of a test set": ("icon-park-outline", "icon-park-twotone", "icons8", "wpf", "la"),
}  # fmt: skip
"""Sets that are not used, by reason."""

RESTRICTED = re.compile(r"NC|ND|SA|GPL|MPL")
"""Licenses that forbid commerce or changes, or ask that derived works have the same license."""


def reason_to_leave_out(prefix: str, info: Mapping[str, Any]) -> str | None:
    """Why the set of a prefix is not used, given its entry in `collections.json`; None when it is used."""
    if (category := info.get("category", "")) in ("Emoji", "Logos"):
        return category.lower()
    if RESTRICTED.search(license_of(info)):
        return f"licence {license_of(info)}"
    return next((reason for reason, prefixes in LEFT_OUT.items() if prefix in prefixes), None)


def license_of(info: Mapping[str, Any]) -> str:
    """The SPDX name of a set's license, else its title."""
    license = info.get("license", {})
    return str(license.get("spdx") or license.get("title") or "unknown")


def split_of(prefix: str) -> str:
    """The split that a set belongs to: "train", "validation" or "test"."""
    return "test" if prefix in TEST else "validation" if prefix in VALIDATION else "train"


# Choice: the icons that are drawn, and their names and keywords.

STYLES_KEPT = 2
"""Drawings of one thing by one set."""

DESIGNERS_OF_A_WORD = 3
"""A word that no dictionary has counts as one when so many sets use it."""

LOGO_SETS = 3
"""A name that so many sets of logos have, and WordNet not, is a company's."""


@dataclass
class Icon:
    """An icon to draw: its name in its set, the thing that it shows in words, further names, category and keywords."""

    drawing: str
    name: str
    others: list[str] = field(default_factory=list)
    category: str = ""
    keywords: list[str] = field(default_factory=list)

    def row(self, prefix: str, info: Mapping[str, Any]) -> Row:
        """The icon's row, given its set."""
        return {
            "key": f"{prefix}/{self.drawing}",
            "split": split_of(prefix),
            "set": prefix,
            "title": info["name"],
            "author": info.get("author", {}).get("name", ""),
            "licence": license_of(info),
            "name": self.name,
            "category": self.category,
            "captions": [self.name, *self.others],
            "keywords": self.keywords,
        }


class EmojiNames:
    """The names of emoji that no icon may have, so that the test of the emoji stays one when icons are trained on."""

    def __init__(self, concepts: Mapping[str, Concept]) -> None:
        held_out = [concept for concept in concepts.values() if is_held_out(group_of(concept.name))]
        self._names = {squash(concept.name) for concept in concepts.values()}
        self._held_out = {squash(name) for concept in held_out for name in (concept.name, *concept.names)}
        self._groups = {group_of(concept.name) for concept in held_out}

    def taboo(self, name: str, *others: str) -> bool:
        """Whether a thing has an emoji's name, or any name of a held-out one."""
        return squash(name) in self._names or any(map(self.holds_out, (name, *others)))

    def holds_out(self, name: str) -> bool:
        """Whether it is any name of a held-out emoji, or of a variant of one."""
        return squash(name) in self._held_out or group_of(name) in self._groups


def choose(packages: Packages) -> dict[str, list[Icon]]:
    """Choose the icons of all sets, by the prefix of their set."""
    infos, sets = _infos(packages), packages[PACKAGE].folder / "json"
    logos = _logo_names(sets, infos)
    concepts, _ = read_concepts(packages)
    tidy(concepts)
    emoji, tags = EmojiNames(concepts), _tags(packages)
    used = [prefix for prefix, info in infos.items() if not reason_to_leave_out(prefix, info)]
    chosen = {prefix: list(_icons(IconSet(sets, f"{prefix}.json"), logos)) for prefix in used}
    common = _common_words(chosen)
    for prefix, icons in chosen.items():
        icons[:] = [icon for icon in icons if is_readable(icon.name.split(), common)]
        for icon in icons:
            others = [name for name in icon.others if is_readable(name.split(), common)]
            icon.others = distinct(others, [icon.name])
        if split_of(prefix) == "train":
            icons[:] = [icon for icon in icons if not emoji.taboo(icon.name, *icon.others)]
        for icon in icons:
            keywords = [icon.category, *tags.get(squash(icon.name), ())]
            keywords = [word for word in keywords if word and not emoji.holds_out(word)]
            icon.keywords = distinct(keywords, [icon.name, *icon.others])
    return chosen


def _icons(icons: IconSet, logos: Collection[str]) -> Iterator[Icon]:
    """The icons of a set in at most `STYLES_KEPT` styles each, without moving ones and logos."""
    categories: dict[str, list[str]] = defaultdict(list)
    for category, members in icons.categories.items():
        for member in members:
            categories[member].append(category)
    variants: dict[str, dict[str, str]] = defaultdict(dict)
    names = {*icons.icons, *icons.aliases}
    names |= set(map(without_number, names))
    for drawing, icon in icons.icons.items():
        shown, style = split_style(drawing, names)
        if "<animate" not in icon["body"] and not _is_logo(shown, categories[drawing], logos):
            variants[shown].setdefault(style, drawing)
    for shown, styles in variants.items():
        # Drawings that look most unlike one another: of each look the first, lines before filled before the others.
        looks: dict[int, str] = {}
        for style, drawing in sorted(styles.items(), key=lambda item: STYLES[item[0]]):
            looks.setdefault(STYLES[style], drawing)
        for drawing in list(looks.values())[:STYLES_KEPT]:
            sorted_under = categories[drawing]
            others = [split_style(other, names)[0] for other in icons.other_names(drawing)]
            yield Icon(
                drawing,
                " ".join(words_of(shown, sorted_under)),
                [" ".join(words_of(other, sorted_under)) for other in others],
                " ".join(category_words(sorted_under[0])) if sorted_under else "",
            )


def _is_logo(shown: str, categories: list[str], logos: Collection[str]) -> bool:
    words = shown.split("-")
    sorted_so = any({"brand", "brands", "logo", "logos", "flags"} & {*category_words(c)} for c in categories)
    return sorted_so or bool({"brand", "logo", "logos"} & {words[0], words[-1]}) or squash(shown) in logos


def _logo_names(sets: Path, infos: Mapping[str, Any]) -> set[str]:
    """Names, squashed, that several sets of logos have and that are no English words."""
    logos = (IconSet(sets, f"{prefix}.json") for prefix, info in infos.items() if info.get("category") == "Logos")
    users = Counter(name for each in logos for name in each.icons)
    return {squash(name) for name, count in users.items() if count >= LOGO_SETS and not is_word(name)}


def _common_words(chosen: Mapping[str, list[Icon]]) -> set[str]:
    """Words that several sets use."""
    users = Counter(word for icons in chosen.values() for word in {w for icon in icons for w in icon.name.split()})
    return {word for word, count in users.items() if count >= DESIGNERS_OF_A_WORD}


def _tags(packages: Packages) -> dict[str, list[str]]:
    """Keywords by squashed name, from the packages that say more."""
    lucide, tabler = (packages[name].folder for name in TAGS)
    written: dict[str, list[str]] = dict(read_json(lucide / "tags.json"))
    for name, icon in read_json(tabler / "icons.json").items():
        written[name] = [*written.get(name, ()), icon.get("category", ""), *map(str, icon.get("tags", ()))]
    tags: dict[str, list[str]] = {}
    for name, words in written.items():
        plain = (" ".join(category_words(str(word))) for word in words)
        tags.setdefault(squash(name), []).extend(word for word in plain if len(word) > 2)
    return tags


# Names: the words of an icon's name without the style.

STYLES: dict[str, int] = {
    "": 0, "outline": 0, "outlined": 0, "line": 0, "linear": 0, "regular": 0, "stroke": 0, "baseline": 0, "path": 0,
    "fill": 1, "filled": 1, "solid": 1, "bold": 1, "flat": 1, "f": 1,
    "duotone": 2, "duo": 2, "twotone": 2, "two-tone": 2, "remix": 2, "color": 2,
    "o": 0, "r": 3, "s": 3, "thin": 3, "light": 3, "sharp": 3, "round": 3, "rounded": 3, "broken": 3, "active": 3,
    "expressive": 3, "alt": 3, "lg": 3, "md": 3, "sm": 3, "xs": 3, "xl": 3,
}  # fmt: skip
"""Look of a style: 0 drawn in lines, 1 filled, 2 in two tones, 3 a variant of these."""

ALWAYS = frozenset(
    ("outline", "outlined", "fill", "filled", "solid", "duotone", "twotone", "two-tone", "alt", "lg", "md")
)
"""Style words that are never part of the thing shown; "traffic light" and "bar line" need a sibling as proof."""

MOST_WORDS = 5


def split_style(name: str, names: Container[str]) -> tuple[str, str]:
    """Split a name such as "home-2-line" into the thing shown and the style, ("home", "line"), without the number.

    Args:
        names: All names of the set and these without their numbers; "home-fill" or "home" among them shows that
            "line" is a style.
    """
    rest, style_found = re.sub(r"-+", "-", name), ""
    while True:
        rest = without_number(rest)
        style = next((s for s in STYLES if s and rest.endswith(f"-{s}") and _is_style(rest, s, names)), None)
        if style is None:
            return rest, style_found
        rest = rest.removesuffix(f"-{style}")
        style_found = style if STYLES[style] >= STYLES[style_found] else style_found


def without_number(name: str) -> str:
    """The name without the running number, or size in pixels, at its end."""
    return re.sub(r"(-\d+(px|x\d+)?)+$", "", name)


def _is_style(name: str, style: str, names: Container[str]) -> bool:
    base = name.removesuffix(f"-{style}")
    siblings = (base, *(f"{base}-{other}" for other in STYLES if other and other != style))
    return style in ALWAYS or any(sibling in names for sibling in siblings)


def words_of(shown: str, categories: Iterable[str] = ()) -> list[str]:
    """The words of a name without its style and category: "design-color-bucket" under "Design" gives color, bucket."""
    for category in categories:
        before = "-".join(category_words(category)) + "-"
        if shown.startswith(before) and len(shown) > len(before) + 2:
            shown = shown.removeprefix(before)
            break
    return [word for word in shown.lower().split("-") if word]


def category_words(category: str) -> list[str]:
    """The words of a category: "FoodDrink" and "Food / Drink" both give food, drink."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", category)
    return re.findall(r"[a-z]+", spaced.lower())


def is_readable(words: list[str], common: Collection[str]) -> bool:
    """Whether the words are WordNet's or among the `common` ones, and one of them has two letters or more."""
    if not 0 < len(words) <= MOST_WORDS or not any(len(word) > 1 and word.isalpha() for word in words):
        return False
    return all(word in common or (word.isalpha() and (len(word) == 1 or is_word(word))) for word in words)
