"""Build the table of `builtin:icons`: the chosen drawings, their names and keywords.

    python packages/declip-sets/scripts/build_icons.py PACKAGES

PACKAGES is a folder with the unpacked npm packages `@iconify/json` 2.2.535, `lucide-static` 1.62.0
and `@tabler/icons` 3.52.0, each under its name. The same files give the same bytes.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from build_emoji import Iconify, distinct, group_of, squash

from declip.data.text.augment import table
from declip_sets.fetch import read_json
from declip_sets.sets import ICONS_PACKAGE, SPLIT_OF, license_of
from declip_sets.tables import asset, read_rows, split_texts
from packing import pack

# Reason → prefixes of sets that are not used.
LEFT_OUT = {
    "old version or further weight": (
        "fa", "fa-solid", "fa-regular", "fa-brands", "fa6-solid", "fa6-regular",
        "fa6-brands", "bx", "bxs", "bxl", "ic", "material-symbols-light",
        "feather", "heroicons-outline", "heroicons-solid", "pepicons",
        "pepicons-print", "mono-icons", "streamline-guidance",
    ),
    # Mostly other companies' trademarks, though their category does not say so.
    "logos": (
        "devicon", "devicon-line", "devicon-original", "devicon-plain",
        "skill-icons", "vscode-icons", "material-icon-theme", "file-icons",
        "catppuccin", "gcp", "unjs", "k8s", "academicons", "ginetex",
    ),
    "flags": ("flag", "circle-flags", "flagpack", "cif"),
    "emoji": ("fluent-emoji",),
    "names do not read as words": ("whh", "medical-icon", "wi"),
    "designer of a test set": ("icon-park-outline", "icon-park-twotone", "icons8", "wpf", "la"),
}  # fmt: skip

# Parts of licenses that forbid commercial use or changes, or require the same license for derived
# works.
RESTRICTED = re.compile(r"NC|ND|SA|GPL|MPL")


def reason_to_leave_out(prefix: str, info: Mapping[str, Any]) -> str | None:
    """Why a set is not used, from its entry in `collections.json`, or None."""
    category = info.get("category", "")
    if category in ("Emoji", "Logos"):
        return category.lower()
    if RESTRICTED.search(license_of(info)):
        return f"license {license_of(info)}"
    for reason, prefixes in LEFT_OUT.items():
        if prefix in prefixes:
            return reason
    return None


MOST_WORDS = 5  # of a name; longer names are sentences


def is_readable(words: list[str], common: Collection[str]) -> bool:
    """Whether all words are in WordNet or `common`, and one has at least two letters."""
    if not 0 < len(words) <= MOST_WORDS:
        return False
    if not any(len(word) > 1 and word.isalpha() for word in words):
        return False
    return all(word in common or _is_known(word) for word in words)


def _is_known(word: str) -> bool:
    return word.isalpha() and (len(word) == 1 or word in table())


Row = dict[str, Any]

STYLES_KEPT = 2  # drawings of one thing by one set
DESIGNERS_OF_A_WORD = 3  # sets that must use a word that is in no dictionary
# Sets of logos that must have a name, absent from WordNet, for it to be a company's.
LOGO_SETS = 3


class EmojiNames:
    """Names of emoji that no icon may have, so that icons do not leak the emoji test."""

    def __init__(self, emoji: Collection[Mapping[str, str]]) -> None:
        self._names = {squash(row["name"]) for row in emoji}
        self._held_out = set()
        self._groups = set()
        for row in emoji:
            if row["held_out"] != "1":
                continue
            for name in (row["name"], *split_texts(row["names"])):
                self._held_out.add(squash(name))
            self._groups.add(row["group"])

    def taboo(self, name: str, *others: str) -> bool:
        """Whether an icon has an emoji's name, or any name of a held-out emoji."""
        if squash(name) in self._names:
            return True
        return any(self.holds_out(each) for each in (name, *others))

    def holds_out(self, name: str) -> bool:
        """Whether a name belongs to a held-out emoji or a variant of one."""
        return squash(name) in self._held_out or group_of(name) in self._groups


def rows_of(icons: Iconify, logos: Collection[str]) -> Iterator[Row]:
    """The icons of a set in at most `STYLES_KEPT` styles each, without animated ones and logos."""
    names = icons.names | {without_number(name) for name in icons.names}
    # --- drawings by the thing shown and style
    variants: dict[str, dict[str, str]] = defaultdict(dict)
    for drawing, icon in icons.icons.items():
        shown, style = split_style(drawing, names)
        if "<animate" in icon["body"]:
            continue
        if not is_logo(shown, icons.categories[drawing], logos):
            variants[shown].setdefault(style, drawing)
    # --- rows
    for shown, styles in variants.items():
        for drawing in unlike(styles):
            categories = icons.categories[drawing]
            captions = [" ".join(words_of(shown, categories))]
            for other in icons.other_names[drawing]:
                name = split_style(other, names)[0]
                captions.append(" ".join(words_of(name, categories)))
            category = category_words(categories[0]) if categories else []
            yield {
                "key": f"{icons.prefix}/{drawing}",
                "set": icons.prefix,
                "category": " ".join(category),
                "captions": captions,
            }


def unlike(styles: Mapping[str, str]) -> list[str]:
    """Drawings of one thing, by style, that look most unlike one another.

    Of each look the first, lines before filled before the others.
    """
    looks: dict[int, str] = {}
    for style in sorted(styles, key=STYLES.__getitem__):
        looks.setdefault(STYLES[style], styles[style])
    return list(looks.values())[:STYLES_KEPT]


LOGO_CATEGORIES = {"brand", "brands", "logo", "logos", "flags"}
LOGO_WORDS = {"brand", "logo", "logos"}


def is_logo(shown: str, categories: list[str], logos: Collection[str]) -> bool:
    """Whether categories, the first or last word or the name say that it is a logo."""
    for category in categories:
        if not LOGO_CATEGORIES.isdisjoint(category_words(category)):
            return True
    words = shown.split("-")
    if not LOGO_WORDS.isdisjoint((words[0], words[-1])):
        return True
    return squash(shown) in logos


def logo_names(sets: Path, infos: Mapping[str, Any]) -> set[str]:
    """Squashed names that several sets of logos have and that are not English words."""
    users: Counter[str] = Counter()
    for prefix, info in infos.items():
        if info.get("category") == "Logos":
            users.update(Iconify(sets / f"{prefix}.json").icons.keys())
    frequent = (name for name, count in users.items() if count >= LOGO_SETS)
    return {squash(name) for name in frequent if name not in table()}


def read_tags(packages: Path) -> dict[str, list[str]]:
    """Keywords by squashed name, of Lucide and Tabler."""
    written: dict[str, list[str]] = dict(read_json(packages / "lucide-static/tags.json"))
    for name, icon in read_json(packages / "@tabler/icons/icons.json").items():
        tags = [str(tag) for tag in icon.get("tags", ())]
        written[name] = [*written.get(name, ()), icon.get("category", ""), *tags]
    by_name: dict[str, list[str]] = defaultdict(list)
    for name, words in written.items():
        for word in words:
            plain = " ".join(category_words(str(word)))
            if len(plain) > 2:
                by_name[squash(name)].append(plain)
    return by_name


OUTLINE, FILLED, TWO_TONES, VARIANT = range(4)
WORDS_OF_STYLES = {
    OUTLINE: "outline outlined line linear regular stroke baseline path",
    FILLED: "fill filled solid bold flat f",
    TWO_TONES: "duotone duo twotone two-tone remix color",
}
LATER_WORDS = {
    OUTLINE: "o",
    VARIANT: "r s thin light sharp round rounded broken active expressive alt lg md sm xs xl",
}


def _styles() -> dict[str, int]:
    """Style → look, in the order in which names are searched for styles."""
    styles = {"": OUTLINE}
    for looks in (WORDS_OF_STYLES, LATER_WORDS):
        for look, words in looks.items():
            styles |= dict.fromkeys(words.split(), look)
    return styles


STYLES = _styles()

# Style words that are never part of the thing; for others ("traffic light", "bar line") a sibling
# must exist.
ALWAYS = {
    "outline", "outlined", "fill", "filled", "solid",
    "duotone", "twotone", "two-tone", "alt", "lg", "md",
}  # fmt: skip


def split_style(name: str, names: Container[str]) -> tuple[str, str]:
    """Split a name into the thing shown and the style: "home-2-line" into ("home", "line").

    Args:
        names: All names of the set and these without their numbers; "home-fill" or "home" among
            them shows that "line" is a style.
    """
    rest, found = re.sub(r"-+", "-", name), ""
    while True:
        rest = without_number(rest)
        style = _style_of(rest, names)
        if style is None:
            return rest, found
        rest = rest.removesuffix(f"-{style}")
        if STYLES[style] >= STYLES[found]:
            found = style


def _style_of(name: str, names: Container[str]) -> str | None:
    """The style at the end of a name, without a number there."""
    for style in STYLES:
        if style and name.endswith(f"-{style}") and _is_style(name, style, names):
            return style
    return None


def without_number(name: str) -> str:
    """Remove the number or size in pixels at the end of a name."""
    return re.sub(r"(-\d+(px|x\d+)?)+$", "", name)


def _is_style(name: str, style: str, names: Container[str]) -> bool:
    if style in ALWAYS:
        return True
    base = name.removesuffix(f"-{style}")
    if base in names:
        return True
    others = (other for other in STYLES if other and other != style)
    return any(f"{base}-{other}" in names for other in others)


def words_of(shown: str, categories: Iterable[str] = ()) -> list[str]:
    """The words of a name without style and category: color, bucket.

    The name is "design-color-bucket", its category "Design".
    """
    for category in categories:
        before = "-".join(category_words(category)) + "-"
        if shown.startswith(before) and len(shown) > len(before) + 2:
            shown = shown.removeprefix(before)
            break
    return [word for word in shown.lower().split("-") if word]


def category_words(category: str) -> list[str]:
    """The words of a category: "FoodDrink" and "Food / Drink" → food, drink."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", category)
    return re.findall(r"[a-z]+", spaced.lower())


ORDER = ("test", "validation", "train")


def choose(packages: Path) -> Iterator[Row]:
    """Choose the icons.

    Held-out sets first: of two equal drawings the first is kept, so that training has none of the
    test's.
    """
    rows = read_candidates(packages)
    common = common_words(rows)
    emoji = EmojiNames(read_rows("emoji"))
    tags = read_tags(packages)
    for row in rows:
        name, *others = row["captions"]
        if not is_readable(name.split(), common):
            continue
        readable = [other for other in others if is_readable(other.split(), common)]
        others = distinct(readable, [name])
        if split_of(row["set"]) == "train" and emoji.taboo(name, *others):
            continue
        words = [row["category"], *tags.get(squash(name), ())]
        allowed = [word for word in words if word and not emoji.holds_out(word)]
        captions = [name, *others]
        yield row | {"captions": captions, "keywords": distinct(allowed, captions)}


def split_of(prefix: str) -> str:
    return SPLIT_OF.get(prefix, "train")


def read_candidates(packages: Path) -> list[Row]:
    """The icons of all sets that may be used, held-out sets first."""
    sets = packages / ICONS_PACKAGE / "json"
    infos = read_json(packages / ICONS_PACKAGE / "collections.json")
    used = [prefix for prefix, info in infos.items() if not reason_to_leave_out(prefix, info)]
    used.sort(key=lambda prefix: (ORDER.index(split_of(prefix)), prefix))
    logos = logo_names(sets, infos)
    rows = []
    for prefix in used:
        rows += rows_of(Iconify(sets / f"{prefix}.json"), logos)
    return rows


def common_words(rows: Iterable[Row]) -> set[str]:
    """Words of names that several designers use."""
    uses = set()
    for row in rows:
        for word in row["captions"][0].split():
            uses.add((word, row["set"]))
    users = Counter(word for word, _ in uses)
    return {word for word, count in users.items() if count >= DESIGNERS_OF_A_WORD}


def main() -> None:
    """Write the table into the package."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path)
    lines = ["key\tcategory\tcaptions\tkeywords"]
    for row in choose(parser.parse_args().packages):
        captions = "|".join(row["captions"])
        keywords = "|".join(row["keywords"])
        lines.append("\t".join((row["key"], row["category"], captions, keywords)))
    packed = pack(lines)
    Path(str(asset("icons.tsv.xz"))).write_bytes(packed)
    print(f"{len(lines) - 1:,} icons, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
