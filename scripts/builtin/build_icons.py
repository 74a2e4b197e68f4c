"""Build the table of `builtin:icons`: the chosen drawings, their names and keywords.

    python scripts/builtin/build_icons.py PACKAGES

PACKAGES is a folder with the unpacked npm packages `@iconify/json` 2.2.535, `lucide-static` 1.62.0 and `@tabler/icons`
3.52.0, each under its name. The same files give the same bytes.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from build_emoji import Iconify, distinct, group_of, squash
from declip.data.builtin.fetch import read_json
from declip.data.builtin.sets import ICONS_PACKAGE, SPLIT_OF, license_of
from declip.data.tables import asset, read_rows, split_texts
from declip.data.text.augment import table
from packing import pack

TAGS = ("lucide-static", "@tabler/icons")
"""Packages with keywords for icon names."""

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
"""Reason → prefixes of sets that are not used."""

RESTRICTED = re.compile(r"NC|ND|SA|GPL|MPL")
"""Parts of licenses that forbid commercial use or changes, or require the same license for derived works."""


def reason_to_leave_out(prefix: str, info: Mapping[str, Any]) -> str | None:
    """Return why a set is not used, from its entry in `collections.json`, or None."""
    if (category := info.get("category", "")) in ("Emoji", "Logos"):
        return category.lower()
    if RESTRICTED.search(license_of(info)):
        return f"license {license_of(info)}"
    return next((reason for reason, prefixes in LEFT_OUT.items() if prefix in prefixes), None)


MOST_WORDS = 5
"""Most words of a name; longer names are sentences."""


def is_readable(words: list[str], common: Collection[str]) -> bool:
    """Return whether all words are in WordNet or `common`, and one has at least two letters."""
    if not 0 < len(words) <= MOST_WORDS or not any(len(word) > 1 and word.isalpha() for word in words):
        return False
    return all(word in common or (word.isalpha() and (len(word) == 1 or word in table())) for word in words)


Row = dict[str, Any]

STYLES_KEPT = 2
"""Drawings of one thing by one set."""

DESIGNERS_OF_A_WORD = 3
"""Sets that must use a word that is in no dictionary."""

LOGO_SETS = 3
"""Sets of logos that must have a name, absent from WordNet, for it to be a company's."""


class EmojiNames:
    """Names of emoji that no icon may have, so that training on icons does not leak the emoji test."""

    def __init__(self, emoji: Collection[Mapping[str, str]]) -> None:
        held_out = [row for row in emoji if row["held_out"] == "1"]
        self._names = {squash(row["name"]) for row in emoji}
        self._held_out = {squash(name) for row in held_out for name in (row["name"], *split_texts(row["names"]))}
        self._groups = {row["group"] for row in held_out}

    def taboo(self, name: str, *others: str) -> bool:
        """Return whether an icon has an emoji's name, or any name of a held-out emoji."""
        return squash(name) in self._names or any(map(self.holds_out, (name, *others)))

    def holds_out(self, name: str) -> bool:
        """Return whether a name belongs to a held-out emoji or a variant of one."""
        return squash(name) in self._held_out or group_of(name) in self._groups


def _rows(icons: Iconify, logos: Collection[str]) -> Iterator[Row]:
    """Return the icons of a set in at most `STYLES_KEPT` styles each, without animated ones and logos."""
    variants: dict[str, dict[str, str]] = defaultdict(dict)
    names = icons.names | set(map(without_number, icons.names))
    for drawing, icon in icons.icons.items():
        shown, style = split_style(drawing, names)
        if "<animate" not in icon["body"] and not _is_logo(shown, icons.categories[drawing], logos):
            variants[shown].setdefault(style, drawing)
    for shown, styles in variants.items():
        # Drawings that look most unlike one another: of each look the first, lines before filled before the others.
        looks: dict[int, str] = {}
        for style, drawing in sorted(styles.items(), key=lambda item: STYLES[item[0]]):
            looks.setdefault(STYLES[style], drawing)
        for drawing in list(looks.values())[:STYLES_KEPT]:
            categories = icons.categories[drawing]
            others = (split_style(other, names)[0] for other in icons.other_names[drawing])
            captions = [" ".join(words_of(name, categories)) for name in (shown, *others)]
            yield {
                "key": f"{icons.prefix}/{drawing}",
                "set": icons.prefix,
                "category": " ".join(category_words(categories[0])) if categories else "",
                "captions": captions,
            }


def _is_logo(shown: str, categories: list[str], logos: Collection[str]) -> bool:
    words = shown.split("-")
    sorted_so = any({"brand", "brands", "logo", "logos", "flags"} & {*category_words(c)} for c in categories)
    return sorted_so or bool({"brand", "logo", "logos"} & {words[0], words[-1]}) or squash(shown) in logos


def _logo_names(sets: Path, infos: Mapping[str, Any]) -> set[str]:
    """Return squashed names that several sets of logos have and that are not English words."""
    logos = (Iconify(sets / f"{prefix}.json") for prefix, info in infos.items() if info.get("category") == "Logos")
    users = Counter(name for each in logos for name in each.icons)
    return {squash(name) for name, count in users.items() if count >= LOGO_SETS and name not in table()}


def _tags(packages: Path) -> dict[str, list[str]]:
    """Read keywords by squashed name."""
    lucide, tabler = (packages / name for name in TAGS)
    written: dict[str, list[str]] = dict(read_json(lucide / "tags.json"))
    for name, icon in read_json(tabler / "icons.json").items():
        written[name] = [*written.get(name, ()), icon.get("category", ""), *map(str, icon.get("tags", ()))]
    tags: dict[str, list[str]] = {}
    for name, words in written.items():
        plain = (" ".join(category_words(str(word))) for word in words)
        tags.setdefault(squash(name), []).extend(word for word in plain if len(word) > 2)
    return tags


STYLES: dict[str, int] = {
    "": 0, "outline": 0, "outlined": 0, "line": 0, "linear": 0, "regular": 0, "stroke": 0, "baseline": 0, "path": 0,
    "fill": 1, "filled": 1, "solid": 1, "bold": 1, "flat": 1, "f": 1,
    "duotone": 2, "duo": 2, "twotone": 2, "two-tone": 2, "remix": 2, "color": 2,
    "o": 0, "r": 3, "s": 3, "thin": 3, "light": 3, "sharp": 3, "round": 3, "rounded": 3, "broken": 3, "active": 3,
    "expressive": 3, "alt": 3, "lg": 3, "md": 3, "sm": 3, "xs": 3, "xl": 3,
}  # fmt: skip
"""Style → look: 0 outline, 1 filled, 2 two tones, 3 a variant of these."""

ALWAYS = frozenset(
    ("outline", "outlined", "fill", "filled", "solid", "duotone", "twotone", "two-tone", "alt", "lg", "md")
)
"""Style words that are never part of the thing; for others ("traffic light", "bar line") a sibling must exist."""


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
    """Remove the number or size in pixels at the end of a name."""
    return re.sub(r"(-\d+(px|x\d+)?)+$", "", name)


def _is_style(name: str, style: str, names: Container[str]) -> bool:
    base = name.removesuffix(f"-{style}")
    siblings = (base, *(f"{base}-{other}" for other in STYLES if other and other != style))
    return style in ALWAYS or any(sibling in names for sibling in siblings)


def words_of(shown: str, categories: Iterable[str] = ()) -> list[str]:
    """Return the words of a name without style and category: "design-color-bucket" in "Design" → color, bucket."""
    for category in categories:
        before = "-".join(category_words(category)) + "-"
        if shown.startswith(before) and len(shown) > len(before) + 2:
            shown = shown.removeprefix(before)
            break
    return [word for word in shown.lower().split("-") if word]


def category_words(category: str) -> list[str]:
    """Return the words of a category: "FoodDrink" and "Food / Drink" → food, drink."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", category)
    return re.findall(r"[a-z]+", spaced.lower())


def choose(packages: Path) -> Iterator[Row]:
    """Choose the icons.

    Held-out sets first: of two equal drawings the first is kept, so that training has none of the test's.
    """
    sets = packages / ICONS_PACKAGE / "json"
    infos = read_json(packages / ICONS_PACKAGE / "collections.json")
    used = [prefix for prefix, info in infos.items() if not reason_to_leave_out(prefix, info)]
    used.sort(key=lambda prefix: (("test", "validation", "train").index(SPLIT_OF.get(prefix, "train")), prefix))
    logos = _logo_names(sets, infos)
    rows = [row for prefix in used for row in _rows(Iconify(sets / f"{prefix}.json"), logos)]
    users = Counter(word for word, _ in {(word, row["set"]) for row in rows for word in row["captions"][0].split()})
    common = {word for word, count in users.items() if count >= DESIGNERS_OF_A_WORD}
    emoji, tags = EmojiNames(read_rows("emoji")), _tags(packages)
    for row in rows:
        name, *others = row["captions"]
        if not is_readable(name.split(), common):
            continue
        others = distinct((other for other in others if is_readable(other.split(), common)), [name])
        if SPLIT_OF.get(row["set"], "train") == "train" and emoji.taboo(name, *others):
            continue
        keywords = [row["category"], *tags.get(squash(name), ())]
        keywords = distinct((word for word in keywords if word and not emoji.holds_out(word)), [name, *others])
        yield row | {"captions": [name, *others], "keywords": keywords}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    lines = ["key\tcategory\tcaptions\tkeywords"]
    for row in choose(parser.parse_args().packages):
        lines.append("\t".join((row["key"], row["category"], "|".join(row["captions"]), "|".join(row["keywords"]))))
    packed = pack(lines)
    Path(str(asset("icons.tsv.xz"))).write_bytes(packed)
    print(f"{len(lines) - 1:,} icons, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
