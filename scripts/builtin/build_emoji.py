"""Build the table of `builtin:emoji`: names of emoji, and the drawings of each.

    python scripts/builtin/build_emoji.py PACKAGES

PACKAGES is a folder with the unpacked npm packages of `declip.data.builtin.sets.DESIGNS`, `emojibase-data` 17.0.0
and `emojilib` 4.0.3, each under its name. The same files give the same bytes.
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

from declip.data.builtin.fetch import read_json
from declip.data.builtin.sets import DESIGN, DESIGNS
from declip.data.tables import asset
from packing import pack

COLUMNS = ("code", "name", "category", "group", "held_out", "names", "drawn", "keywords", *DESIGN)
"""Columns of the table. The last ones name each designer's drawing. "names" are further names, each of this emoji
alone, and "drawn" are those by the designers."""

CORRECTIONS = Path(__file__).parent / "emoji_corrections"
SPELLED = {design.key for design in DESIGNS} - {"fxemoji"}
"""Designs whose drawing names are words, and serve as captions."""

SHORT_NAMES = ("emojibase", "iamcal", "github", "joypixels")
"""Lists of short names as chat programs write them, best English first."""

PARTS = 2
"""emojibase's group of components, which are not emoji: skin tones and hair."""

NO_PHRASE = re.compile(r"^flag \w\w$|\b[bgmw]{2,4}$|\bu[0-9a-f]{4}\b|[a-z]\d|[<>:;=\\/]")
"""Codes and emoticons: "flag fr", "family wg" (woman, girl), "u6307", "clock10", ":D"."""

HELD_OUT_FRACTION = 0.2
SALT = "30"
"""The smallest number that holds out 309 of the test designer's 1,594 concepts, and not the group of 262 country flags,
which this designer did not draw."""

NUMBERS = "one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
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
"""Patterns over a full name → group; the first match counts."""

VARIANTS = re.compile(
    r"\b(mr|mrs|ms|mx|man|men|woman|women|people|person|child|adult"
    r"|red|orange|yellow|green|blue|light blue|purple|brown|black|grey|white|pink"
    r"|left|right|up|down|leftwards|rightwards|upwards|downwards|clockwise|counterclockwise"
    r"|small|medium|large|not)\b(?!’)"
)
"""Words that distinguish only variants: gender, color, direction, size."""

Layer = dict[str, str]
"""Code by squashed name."""


class Iconify:
    """The drawings of one set in Iconify's format.

    Attributes:
        icons: Each drawing's body, and box where it has one of its own.
        names: All names, also of drawings turned.
        other_names: Names by drawing of the same, neither turned nor mirrored.
        categories: Categories by drawing.
    """

    def __init__(self, file: Path) -> None:
        data = read_json(file)
        self.prefix: str = data["prefix"]
        self.icons: dict[str, dict[str, Any]] = {n: i for n, i in data["icons"].items() if not i.get("hidden")}
        self.names = {*self.icons, *data.get("aliases", ())}
        self.other_names: dict[str, list[str]] = defaultdict(list)
        for name, alias in data.get("aliases", {}).items():
            if alias.keys() == {"parent"}:
                self.other_names[alias["parent"]].append(name)
        self.categories: dict[str, list[str]] = defaultdict(list)
        for category, members in data.get("categories", {}).items():
            for member in members:
                self.categories[member].append(category)


@dataclass
class Concept:
    """One emoji, which all its drawings show: code (see `code_of`) and CLDR name."""

    code: str
    name: str
    category: str
    names: list[str] = field(default_factory=list)
    """Further names that no other concept has."""
    drawn: list[str] = field(default_factory=list)
    """Such names from the designers."""
    keywords: list[str] = field(default_factory=list)
    """Words and short phrases that several concepts may share."""


def group_of(name: str) -> str:
    """Return the part of a CLDR name that variants share: "running" of "woman running", "heart" of "green heart".

    Gender, color, direction, size, hour and country are taken away.
    """
    name = name.lower()
    for pattern, group in FAMILIES.items():
        if re.fullmatch(pattern, name):
            return group
    common = re.sub(r"[^\w’]+", " ", VARIANTS.sub(" ", name.split(":")[0])).strip()
    return common or ("person" if VARIANTS.fullmatch(name) else name)


def squash(name: str) -> str:
    """Reduce a name to letters and digits, so that all spellings of it are equal."""
    plain = unicodedata.normalize("NFKD", name.replace("&", "and")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9#*]", "", plain)


def distinct(texts: Iterable[str], but: Iterable[str] = ()) -> list[str]:
    """Return the texts in order without repetitions and those in `but`, in any spelling."""
    known = {squash(text) for text in but}
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(squash(text), text)
    return [text for key, text in first.items() if key not in known]


def code_of(text: str) -> str:
    """Return the code of an emoji (characters or hexadecimal): its code points joined by "-", without FE0F."""
    plain = text if text.isascii() else "-".join(f"{ord(letter):04x}" for letter in text)
    return "-".join(part for part in plain.lower().split("-") if part != "fe0f")


def read_concepts(packages: Path) -> tuple[dict[str, Concept], list[Layer]]:
    """Read all emoji by code, except skin tones and letters of flags, and lists of names, most reliable first."""
    base = packages / "emojibase-data"
    groups = read_json(base / "meta/groups.json")["groups"]
    concepts = {}
    for row in read_json(base / "en/data.json"):
        if row.get("group", PARTS) != PARTS:
            code, category = code_of(row["hexcode"]), groups[str(row["group"])].replace("-", " ")
            concepts[code] = Concept(code, row["label"], category, keywords=list(row.get("tags", [])))
    layers = [{squash(concept.name): code for code, concept in concepts.items()}]

    def add_names(named: Iterable[tuple[str, list[str]]]) -> None:
        """Add further names to concepts, and the list that maps them to concepts."""
        layers.append({})
        for written, names in named:
            if concept := concepts.get(code_of(written)):
                concept.names += names
                for name in names:
                    layers[-1].setdefault(squash(name), concept.code)

    formal = read_json(base / "meta/unicode-names.json").items()
    add_names((code, [name.lower()]) for code, name in formal if "-" not in code)
    for kind in SHORT_NAMES:
        short = read_json(base / f"en/shortcodes/{kind}.json").items()
        lists = ((code, [names] if isinstance(names, str) else names) for code, names in short)
        # "male-doctor" and "male_doctor" both stand for "male doctor".
        add_names((code, [re.sub("[-_]", " ", name) for name in names]) for code, names in lists)
    for emoji, words in read_json(packages / "emojilib/dist/emoji-en-US.json").items():
        if concept := concepts.get(code_of(emoji)):
            concept.keywords += [word.replace("_", " ") for word in words]
    return concepts, layers


def is_phrase(text: str) -> bool:
    """Return whether a text is English words."""
    return bool(re.search(r"[a-z]{3}", text.lower())) and not NO_PHRASE.search(text)


def tidy(concepts: Mapping[str, Concept]) -> None:
    """Keep English names and keywords, once each, and drop names that several concepts have."""
    for concept in concepts.values():
        for texts in (concept.names, concept.drawn, concept.keywords):
            texts[:] = [" ".join(text.replace("_", " ").split()) for text in texts]
    owners = Counter(key for c in concepts.values() for key in {squash(n) for n in [c.name, *c.names, *c.drawn]})
    for concept in concepts.values():
        names, drawn = (
            [name for name in texts if is_phrase(name) and owners[squash(name)] == 1]
            for texts in (concept.names, concept.drawn)
        )
        concept.names = distinct(names, [concept.name])
        concept.drawn = distinct(drawn, [concept.name, *concept.names])
        concept.keywords = distinct(filter(is_phrase, concept.keywords), [concept.name, *concept.names, *concept.drawn])


def is_held_out(group: str) -> bool:
    """Return whether a group is in the held-out fifth, by a hash of its name, so that it never changes."""
    digest = hashlib.sha256(f"{SALT}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


def corrections(prefix: str) -> dict[str, str | None]:
    """Read the codes of drawings with wrong or missing names; None for damaged drawings."""
    file = CORRECTIONS / f"{prefix}.tsv"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    return {name: None if emoji == "-" else code_of(emoji) for name, emoji in (line.split("\t") for line in lines)}


def match(icons: Iconify, chars: Mapping[str, str], codes: Iterable[str], layers: list[Layer]) -> dict[str, str]:
    """Map drawings to emoji.

    By the set's own table of code points or, where it has none, by name: all drawings' names are looked up in a layer
    before the next, more doubtful layer is tried, and their own names before their aliases.

    Returns:
        Drawing by code; a drawing shows one emoji, an emoji has one drawing.
    """
    fixed = corrections(icons.prefix)
    free, left = set(codes), dict.fromkeys(name for name in icons.icons if name not in fixed)
    drawing_of: dict[str, str] = {}

    def take(code: str | None, name: str) -> None:
        if code in free and code is not None:
            drawing_of[code] = name
            free.discard(code)
            left.pop(name, None)

    for name in icons.icons:
        take(fixed.get(name), name)
    for char, name in chars.items():
        if name in left:
            take(code_of(char), name)
    for layer in layers if not chars else ():
        for names_of in (lambda name: [name], lambda name: icons.other_names[name]):
            for name in list(left):
                keys = [squash(re.sub(r"^flag-for-(flag-)?", "flag-", other)) for other in names_of(name)]
                take(next((layer[key] for key in keys if layer.get(key) in free), None), name)
    return drawing_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path)
    packages = parser.parse_args().packages
    concepts, layers = read_concepts(packages)
    sets = {design.key: Iconify(packages / design.package / "icons.json") for design in DESIGNS}
    charts = {}
    for design in DESIGNS:
        chart = packages / design.package / "chars.json"
        charts[design.key] = read_json(chart) if chart.exists() else {}
    charted: Layer = {}
    for key, icons in sets.items():
        for char, name in charts[key].items():
            if (code := code_of(char)) in concepts:
                for other in (name, *icons.other_names[name]):
                    charted.setdefault(squash(other), code)
    layers.insert(1, charted)
    drawings = {key: match(icons, charts[key], concepts, layers) for key, icons in sets.items()}
    for key in sets:
        for code, drawing in drawings[key].items() if key in SPELLED else ():
            names = (name.replace("-", " ") for name in (drawing, *sets[key].other_names[drawing]))
            concepts[code].drawn += [name.replace("flag for flag", "flag for") for name in names]
    tidy(concepts)
    lines = ["\t".join(COLUMNS)]
    for code, concept in concepts.items():
        group = group_of(concept.name)
        lists = ("|".join(texts) for texts in (concept.names, concept.drawn, concept.keywords))
        shown = (drawings[design.key].get(code, "") for design in DESIGNS)
        line = (code, concept.name, concept.category, group, str(int(is_held_out(group))), *lists, *shown)
        lines.append("\t".join(line))
    packed = pack(lines)
    Path(str(asset("emoji.tsv.xz"))).write_bytes(packed)
    print(f"{len(concepts):,} emoji, {len(packed):,} bytes")


if __name__ == "__main__":
    main()
