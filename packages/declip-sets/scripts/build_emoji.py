"""Build the table of `builtin:emoji`: names of emoji, and the drawings of each.

    python packages/declip-sets/scripts/build_emoji.py PACKAGES

PACKAGES is a folder with the unpacked npm packages of `declip_sets.sets.DESIGNS`, `emojibase-data`
17.0.0 and `emojilib` 4.0.3, each under its name. The same files give the same bytes.
"""

import argparse
import hashlib
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from declip_sets.fetch import read_json
from declip_sets.sets import DESIGN, DESIGNS
from declip_sets.tables import asset
from packing import pack

# Of the table. "names" are further names, each of this emoji alone; "drawn" are such names by the
# designers. The last columns name each designer's drawing.
COLUMNS = ("code", "name", "category", "group", "held_out", "names", "drawn", "keywords", *DESIGN)

CORRECTIONS = Path(__file__).parent / "emoji_corrections"
# Designs whose drawing names are words, and serve as captions.
SPELLED = {design.key for design in DESIGNS} - {"fxemoji"}

# Lists of short names as chat programs write them, best English first.
SHORT_NAMES = ("emojibase", "iamcal", "github", "joypixels")

# emojibase's group of components, which are not emoji: skin tones and hair.
PARTS = 2

# Codes and emoticons: "flag fr", "family wg" (woman, girl), "u6307", "clock10", ":D".
NO_PHRASE = re.compile(r"^flag \w\w$|\b[bgmw]{2,4}$|\bu[0-9a-f]{4}\b|[a-z]\d|[<>:;=\\/]")

HELD_OUT_FRACTION = 0.2
# The smallest number that holds out 309 of the test designer's 1,594 concepts, and not the group of
# 262 country flags, which this designer did not draw.
SALT = "30"

NUMBERS = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
# Patterns over a full name → group; the first match counts.
FAMILIES: dict[str, str] = {
    rf"({NUMBERS})( o’clock|-thirty)": "clock",
    r"flag:.*": "country flag",
    r"family.*": "family",
    r"keycap:.*": "keycap",
    r"(man|woman|person): .*|old (man|woman)|older person|child|boy|girl": "person",
    r".*\bmoon( face)?": "moon",
    r".* mailbox .*": "mailbox",
    r"speaker .* volume|muted speaker": "speaker",
    r"globe showing .*": "globe",
    r".*\bclaus": "santa claus",
    r"prince(ss)?": "prince",
    r"mer(man|maid|person)": "merperson",
    r"hourglass .*": "hourglass",
    r"input latin .*": "input latin",
    r".* holding hands": "holding hands",
    r".* button \(blood type\)": "blood type",
    r"\w+ place medal": "place medal",
}

# Words that distinguish only variants: gender, color ("grey heart" is Unicode's), direction, size.
VARIANTS = re.compile(
    r"\b(mr|mrs|ms|mx|man|men|woman|women|people|person|child|adult"
    r"|red|orange|yellow|green|blue|light blue|purple|brown|black|grey|white|pink"
    r"|left|right|up|down|leftwards|rightwards|upwards|downwards|clockwise|counterclockwise"
    r"|small|medium|large|not)\b(?!’)"
)

Layer = dict[str, str]  # code by squashed name
Drawings = dict[str, str]  # drawing by code


class Iconify:
    """The drawings of one set in Iconify's format.

    Attributes:
        icons: Each drawing's body, and its box if it has one.
        names: All names, also of drawings turned.
        other_names: Names by drawing of the same, neither turned nor mirrored.
        categories: Categories by drawing.
    """

    def __init__(self, file: Path) -> None:
        data = read_json(file)
        aliases = data.get("aliases", {})
        self.prefix: str = data["prefix"]
        self.icons: dict[str, dict[str, Any]] = {}
        for name, icon in data["icons"].items():
            if not icon.get("hidden"):
                self.icons[name] = icon
        self.names = {*self.icons, *aliases}
        self.other_names: dict[str, list[str]] = defaultdict(list)
        for name, alias in aliases.items():
            if alias.keys() == {"parent"}:
                self.other_names[alias["parent"]].append(name)
        self.categories: dict[str, list[str]] = defaultdict(list)
        for category, members in data.get("categories", {}).items():
            for member in members:
                self.categories[member].append(category)


@dataclass
class Concept:
    """One emoji, which all its drawings show."""

    code: str  # see `code_of`
    name: str  # CLDR's
    category: str
    names: list[str] = field(default_factory=list)  # further names that no other concept has
    drawn: list[str] = field(default_factory=list)  # such names from the designers
    # Words and short phrases that several concepts may have.
    keywords: list[str] = field(default_factory=list)

    def all_names(self) -> list[str]:
        return [self.name, *self.names, *self.drawn]


Concepts = dict[str, Concept]  # by code


def group_of(name: str) -> str:
    """The part of a name that variants have in common: "running" of "woman running".

    Gender, color, direction, size, hour and country are removed.
    """
    name = name.lower()
    for pattern, group in FAMILIES.items():
        if re.fullmatch(pattern, name):
            return group
    beginning = name.split(":")[0]
    without_variants = VARIANTS.sub(" ", beginning)
    common = re.sub(r"[^\w’]+", " ", without_variants).strip()
    if common:
        return common
    return "person" if VARIANTS.fullmatch(name) else name


def squash(name: str) -> str:
    """Reduce a name to letters and digits, so that all spellings of it are equal."""
    decomposed = unicodedata.normalize("NFKD", name.replace("&", "and"))
    plain = decomposed.encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9#*]", "", plain.lower())


def distinct(texts: Iterable[str], but: Iterable[str] = ()) -> list[str]:
    """The texts in order without repetitions and those in `but`, in any spelling."""
    known = {squash(text) for text in but}
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(squash(text), text)
    return [text for key, text in first.items() if key not in known]


def code_of(text: str) -> str:
    """The code points of an emoji (characters or hexadecimal) joined by "-", without FE0F."""
    if not text.isascii():
        text = "-".join(f"{ord(letter):04x}" for letter in text)
    parts = text.lower().split("-")
    return "-".join(part for part in parts if part != "fe0f")


def read_concepts(packages: Path) -> tuple[Concepts, list[Layer]]:
    """Read the emoji without skin tones and letters of flags.

    Returns:
        Concepts by code; maps of names to codes, the most reliable first.
    """
    base = packages / "emojibase-data"
    concepts = read_names(base)
    full_names: Layer = {}
    for code, concept in concepts.items():
        full_names[squash(concept.name)] = code
    layers = [full_names]
    formal = {}
    for code, name in read_json(base / "meta/unicode-names.json").items():
        if "-" not in code:
            formal[code] = [name.lower()]
    layers.append(add_names(concepts, formal))
    for kind in SHORT_NAMES:
        short = {}
        for code, names in read_json(base / f"en/shortcodes/{kind}.json").items():
            written = [names] if isinstance(names, str) else names
            # "male-doctor" and "male_doctor" both stand for "male doctor".
            short[code] = [re.sub("[-_]", " ", name) for name in written]
        layers.append(add_names(concepts, short))
    for emoji, words in read_json(packages / "emojilib/dist/emoji-en-US.json").items():
        if concept := concepts.get(code_of(emoji)):
            concept.keywords += [word.replace("_", " ") for word in words]
    return concepts, layers


def read_names(base: Path) -> Concepts:
    """Read CLDR's names and keywords of all emoji, by code."""
    groups = read_json(base / "meta/groups.json")["groups"]
    concepts = {}
    for row in read_json(base / "en/data.json"):
        group = row.get("group", PARTS)
        if group == PARTS:
            continue
        code = code_of(row["hexcode"])
        category = groups[str(group)].replace("-", " ")
        tags = list(row.get("tags", []))
        concepts[code] = Concept(code, row["label"], category, keywords=tags)
    return concepts


def add_names(concepts: Concepts, named: Mapping[str, list[str]]) -> Layer:
    """Add further names to concepts; returns the code of each name."""
    layer: Layer = {}
    for written, names in named.items():
        if concept := concepts.get(code_of(written)):
            concept.names += names
            for name in names:
                layer.setdefault(squash(name), concept.code)
    return layer


def is_phrase(text: str) -> bool:
    """Whether a text is English words."""
    has_letters = re.search(r"[a-z]{3}", text.lower())
    return has_letters is not None and not NO_PHRASE.search(text)


def spaced(text: str) -> str:
    """The text with one space between words."""
    words = text.replace("_", " ").split()
    return " ".join(words)


def tidy(concepts: Concepts) -> None:
    """Keep English names and keywords, once each, and drop names that several concepts have."""
    owners: Counter[str] = Counter()
    for concept in concepts.values():
        for texts in (concept.names, concept.drawn, concept.keywords):
            texts[:] = [spaced(text) for text in texts]
        owners.update({squash(name) for name in concept.all_names()})

    def is_own(name: str) -> bool:
        return is_phrase(name) and owners[squash(name)] == 1

    for concept in concepts.values():
        concept.names = distinct(filter(is_own, concept.names), [concept.name])
        known = [concept.name, *concept.names]
        concept.drawn = distinct(filter(is_own, concept.drawn), known)
        concept.keywords = distinct(filter(is_phrase, concept.keywords), concept.all_names())


def is_held_out(group: str) -> bool:
    """Whether a hash of its name puts a group in the held-out fifth, so that this never changes."""
    digest = hashlib.sha256(f"{SALT}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


def corrections(prefix: str) -> dict[str, str | None]:
    """The codes of drawings with wrong or missing names; None for damaged drawings."""
    file = CORRECTIONS / f"{prefix}.tsv"
    if not file.is_file():
        return {}
    codes = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, emoji = line.split("\t")
        codes[name] = None if emoji == "-" else code_of(emoji)
    return codes


class Matching:
    """The drawings of a set that were matched to emoji: one drawing an emoji and vice versa."""

    def __init__(self, icons: Iconify, codes: Iterable[str]) -> None:
        self.icons = icons
        self.corrections = corrections(icons.prefix)
        self.free = set(codes)
        unnamed = (name for name in icons.icons if name not in self.corrections)
        self.left = dict.fromkeys(unnamed)
        self.drawing_of: Drawings = {}

    def take(self, code: str | None, name: str) -> None:
        """Match a drawing to an emoji that has none yet."""
        if code is not None and code in self.free:
            self.drawing_of[code] = name
            self.free.discard(code)
            self.left.pop(name, None)

    def take_by_name(self, layer: Layer, drawing: str, names: list[str]) -> None:
        """Match a drawing by the first of its names that stands for a free emoji."""
        for name in names:
            spelled = re.sub(r"^flag-for-(flag-)?", "flag-", name)
            code = layer.get(squash(spelled))
            if code in self.free:
                self.take(code, drawing)
                return


def match(
    icons: Iconify,
    chars: Mapping[str, str],
    codes: Iterable[str],
    layers: list[Layer],
) -> Drawings:
    """Map drawings to emoji.

    By the set's table of code points or, without one, by name: the names of all drawings are looked
    up in a layer before the next, more doubtful layer is tried, and their names before aliases.

    Returns:
        Drawing by code.
    """
    matching = Matching(icons, codes)
    for name in icons.icons:
        matching.take(matching.corrections.get(name), name)
    for char, name in chars.items():
        if name in matching.left:
            matching.take(code_of(char), name)
    if chars:
        return matching.drawing_of
    for layer in layers:
        for name in list(matching.left):
            matching.take_by_name(layer, name, [name])
        for name in list(matching.left):
            matching.take_by_name(layer, name, icons.other_names[name])
    return matching.drawing_of


class Designs:
    """The drawings of all designers, and their tables of code points."""

    def __init__(self, packages: Path) -> None:
        self.icons: dict[str, Iconify] = {}
        self.chars: dict[str, dict[str, str]] = {}
        for design in DESIGNS:
            folder = packages / design.package
            self.icons[design.key] = Iconify(folder / "icons.json")
            table = folder / "chars.json"
            self.chars[design.key] = read_json(table) if table.exists() else {}

    def layer(self, concepts: Concepts) -> Layer:
        """The emoji of the names of drawings in sets with a table of code points."""
        layer: Layer = {}
        for key, icons in self.icons.items():
            for char, name in self.chars[key].items():
                code = code_of(char)
                if code not in concepts:
                    continue
                for other in (name, *icons.other_names[name]):
                    layer.setdefault(squash(other), code)
        return layer

    def match(self, concepts: Concepts, layers: list[Layer]) -> dict[str, Drawings]:
        """The drawing of each emoji, by designer and code; adds the drawings' names to concepts."""
        drawings = {}
        for key, icons in self.icons.items():
            drawings[key] = match(icons, self.chars[key], concepts, layers)
        for key in self.icons:
            if key in SPELLED:
                self._name(concepts, key, drawings[key])
        return drawings

    def _name(self, concepts: Concepts, key: str, drawings: Drawings) -> None:
        for code, drawing in drawings.items():
            for name in (drawing, *self.icons[key].other_names[drawing]):
                spaced = name.replace("-", " ")
                concepts[code].drawn.append(spaced.replace("flag for flag", "flag for"))


def row_of(concept: Concept, drawings: Mapping[str, Drawings]) -> str:
    """The row of the table."""
    group = group_of(concept.name)
    cells = [concept.code, concept.name, concept.category, group]
    cells.append("1" if is_held_out(group) else "0")
    for texts in (concept.names, concept.drawn, concept.keywords):
        cells.append("|".join(texts))
    for design in DESIGNS:
        cells.append(drawings[design.key].get(concept.code, ""))
    return "\t".join(cells)


def main() -> None:
    """Write the table into the package."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path)
    packages = parser.parse_args().packages
    concepts, layers = read_concepts(packages)
    designs = Designs(packages)
    layers.insert(1, designs.layer(concepts))
    drawings = designs.match(concepts, layers)
    tidy(concepts)
    lines = ["\t".join(COLUMNS)]
    lines += [row_of(concept, drawings) for concept in concepts.values()]
    packed = pack(lines)
    Path(str(asset("emoji.tsv.xz"))).write_bytes(packed)
    print(f"{len(concepts):,} emoji, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
