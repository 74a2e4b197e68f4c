"""What an icon's name says: its words without the style, and which of several styles to draw."""

import re
from collections.abc import Collection, Container, Iterable

from declip.data.text.synonyms import table

STYLES: dict[str, int] = {
    "": 0, "outline": 0, "outlined": 0, "line": 0, "linear": 0, "regular": 0, "stroke": 0, "baseline": 0, "path": 0,
    "fill": 1, "filled": 1, "solid": 1, "bold": 1, "flat": 1, "f": 1,
    "duotone": 2, "duo": 2, "twotone": 2, "two-tone": 2, "remix": 2, "color": 2,
    "o": 0, "r": 3, "s": 3, "thin": 3, "light": 3, "sharp": 3, "round": 3, "rounded": 3, "broken": 3, "active": 3,
    "expressive": 3, "alt": 3, "lg": 3, "md": 3, "sm": 3, "xs": 3, "xl": 3,
}  # fmt: skip
"""How a style looks: 0 drawn in lines, 1 filled, 2 in two tones, 3 a variant of these."""

ALWAYS = frozenset(
    ("outline", "outlined", "fill", "filled", "solid", "duotone", "twotone", "two-tone", "alt", "lg", "md")
)
"""Style words that are never part of what is shown; "traffic light" and "bar line" need a sibling as proof."""

MOST_WORDS = 5


def split_style(name: str, names: Container[str]) -> tuple[str, str]:
    """Take the style and running number off a name.

    Args:
        name: Such as "home-2-line".
        names: All names of the set and these without their numbers; "home-fill" or "home" among them shows that
            "line" is a style.

    Returns:
        What is shown and the style, such as ("home", "line").
    """
    rest, found = re.sub(r"-+", "-", name), ""
    while True:
        rest = without_number(rest)
        style = next((s for s in STYLES if s and rest.endswith(f"-{s}") and _is_style(rest, s, names)), None)
        if style is None:
            return rest, found
        rest = rest.removesuffix(f"-{style}")
        found = style if STYLES[style] >= STYLES[found] else found


def without_number(name: str) -> str:
    """The name without the running number, or size in pixels, at its end."""
    return re.sub(r"(-\d+(px|x\d+)?)+$", "", name)


def _is_style(name: str, style: str, names: Container[str]) -> bool:
    base = name.removesuffix(f"-{style}")
    siblings = (base, *(f"{base}-{other}" for other in STYLES if other and other != style))
    return style in ALWAYS or any(sibling in names for sibling in siblings)


def words_of(shown: str, categories: Iterable[str] = ()) -> list[str]:
    """The words of a name without its style; a category that stands before the name is taken away.

    Args:
        shown: Such as "design-color-bucket".
        categories: The set's categories of this icon, such as "Design".
    """
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
    """Whether the words read as English, one of them having two letters or more.

    Args:
        words: The words.
        common: Words that several designers use, such as "wifi", known whether or not WordNet has them.
    """
    if not 0 < len(words) <= MOST_WORDS or not any(len(word) > 1 and word.isalpha() for word in words):
        return False
    return all(word in common or (word.isalpha() and (len(word) == 1 or _in_wordnet(word))) for word in words)


def _in_wordnet(word: str) -> bool:
    return bool(table().readings(word))
