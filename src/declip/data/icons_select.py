"""Choose which icons are drawn, and what is said of each."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from declip.data.emoji_concepts import Concept, distinct, read_concepts, read_json, squash, tidy
from declip.data.emoji_groups import group_of, is_held_out
from declip.data.emoji_icons import IconSet
from declip.data.icons_names import STYLES, category_words, is_readable, split_style, without_number, words_of
from declip.data.icons_sets import reason_to_leave_out, split_of
from declip.data.text.synonyms import table

PACKAGE = "@iconify/json"
TAGS = {"lucide-static": "1.62.0", "@tabler/icons": "3.52.0"}
"""Packages that say more about an icon of a name than its set does; version by name."""

STYLES_KEPT = 2
"""Drawings of one thing by one set."""

DESIGNERS_OF_A_WORD = 3
"""A word that no dictionary has counts as one when so many sets use it."""

LOGO_SETS = 3
"""A name that so many sets of logos have, and WordNet not, is a company's."""


@dataclass
class Icon:
    """An icon to draw.

    Attributes:
        set: Prefix of its set.
        drawing: Its name there.
        name: What it shows, in words.
        others: Further names.
        category: Such as "food drink", empty when the set has none.
        keywords: Words and short phrases.
    """

    set: str
    drawing: str
    name: str
    others: list[str] = field(default_factory=list)
    category: str = ""
    keywords: list[str] = field(default_factory=list)


class Emoji:
    """The names of emoji that no icon may have, so that the test of the emoji stays one when icons are trained on.

    Args:
        concepts: All emoji.
    """

    def __init__(self, concepts: Mapping[str, Concept]) -> None:
        held_out = [concept for concept in concepts.values() if is_held_out(group_of(concept.name))]
        self._names = {squash(concept.name) for concept in concepts.values()}
        self._held_out = {squash(name) for concept in held_out for name in (concept.name, *concept.names)}
        self._groups = {group_of(concept.name) for concept in held_out}

    def has(self, name: str) -> bool:
        """Whether it is an emoji's name."""
        return squash(name) in self._names

    def holds_out(self, name: str) -> bool:
        """Whether it is any name of a held-out emoji, or of a variant of one."""
        return squash(name) in self._held_out or group_of(name) in self._groups


def read_emoji(packages: Path) -> Emoji:
    """Read the emoji's names from the two text packages."""
    concepts, _ = read_concepts(packages)
    tidy(concepts)
    return Emoji(concepts)


def choose(packages: Path) -> tuple[dict[str, list[Icon]], dict[str, str]]:
    """Choose the icons of all sets.

    Args:
        packages: Folder of unpacked packages, by name.

    Returns:
        The icons by the prefix of their set, and the sets left out with the reason.
    """
    root = packages / PACKAGE
    infos = read_json(root / "collections.json")
    left_out = {prefix: why for prefix, info in infos.items() if (why := reason_to_leave_out(prefix, info))}
    logos = _logo_names(root, infos)
    emoji, tags = read_emoji(packages), _tags(packages)
    found = {
        prefix: list(_icons(IconSet(root / "json", f"{prefix}.json"), logos))
        for prefix in infos
        if prefix not in left_out
    }
    common = _common_words(found)
    chosen = {}
    for prefix, icons in found.items():
        readable = [icon for icon in icons if is_readable(icon.name.split(), common)]
        for icon in readable:
            others = [name for name in icon.others if is_readable(name.split(), common)]
            icon.others = distinct(others, [icon.name])
        kept = [icon for icon in readable if split_of(prefix) != "train" or not _is_emoji(icon, emoji)]
        for icon in kept:
            keywords = [icon.category, *tags.get(squash(icon.name), ())]
            keywords = [word for word in keywords if word and not emoji.holds_out(word)]
            icon.keywords = distinct(keywords, [icon.name, *icon.others])
        chosen[prefix] = kept
    return chosen, left_out


def _is_emoji(icon: Icon, emoji: Emoji) -> bool:
    return emoji.has(icon.name) or any(emoji.holds_out(name) for name in (icon.name, *icon.others))


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
        for drawing in _first_of_each_look(styles):
            sorted_under = categories[drawing]
            others = [split_style(other, names)[0] for other in icons.other_names(drawing)]
            yield Icon(
                icons.prefix,
                drawing,
                " ".join(words_of(shown, sorted_under)),
                [" ".join(words_of(other, sorted_under)) for other in others],
                " ".join(category_words(sorted_under[0])) if sorted_under else "",
            )


def _first_of_each_look(styles: Mapping[str, str]) -> list[str]:
    """Drawings that look most unlike one another: of each look the first, lines before filled before the others."""
    looks: dict[int, str] = {}
    for style, drawing in sorted(styles.items(), key=lambda item: STYLES[item[0]]):
        looks.setdefault(STYLES[style], drawing)
    return list(looks.values())[:STYLES_KEPT]


def _is_logo(shown: str, categories: list[str], logos: Collection[str]) -> bool:
    words = shown.split("-")
    sorted_so = any({"brand", "brands", "logo", "logos", "flags"} & {*category_words(c)} for c in categories)
    return sorted_so or bool({"brand", "logo", "logos"} & {words[0], words[-1]}) or squash(shown) in logos


def _logo_names(root: Path, infos: Mapping[str, Any]) -> set[str]:
    """Names, squashed, that several sets of logos have and that are no English words."""
    sets: dict[str, set[str]] = defaultdict(set)
    for prefix, info in infos.items():
        if info.get("category") == "Logos":
            for name in IconSet(root / "json", f"{prefix}.json").icons:
                sets[name].add(prefix)
    return {
        squash(name) for name, prefixes in sets.items() if len(prefixes) >= LOGO_SETS and not table().readings(name)
    }


def _common_words(found: Mapping[str, list[Icon]]) -> set[str]:
    users: dict[str, set[str]] = defaultdict(set)
    for prefix, icons in found.items():
        for icon in icons:
            for word in icon.name.split():
                users[word].add(prefix)
    return {word for word, prefixes in users.items() if len(prefixes) >= DESIGNERS_OF_A_WORD}


def _tags(packages: Path) -> dict[str, list[str]]:
    """Keywords by squashed name, from the packages that say more."""
    lucide, tabler = (packages / name for name in TAGS)
    written: dict[str, list[str]] = dict(read_json(lucide / "tags.json"))
    for name, icon in read_json(tabler / "icons.json").items():
        written[name] = [*written.get(name, ()), icon.get("category", ""), *map(str, icon.get("tags", ()))]
    tags: dict[str, list[str]] = {}
    for name, words in written.items():
        plain = (" ".join(category_words(str(word))) for word in words)
        tags.setdefault(squash(name), []).extend(word for word in plain if len(word) > 2)
    return tags
