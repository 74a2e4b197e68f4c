"""`builtin:emoji`: emoji drawn by many designers, with their names and keywords.

Several designers drew the same concepts, so the pairs are real and there is a clean test: a held-out designer, for
classes that training knows and for unseen ones.
"""

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from declip.data.builtin.fetch import NpmPackages, Package, Packages, read_json
from declip.data.builtin.pictures import BuiltinSet, Row, Selection
from declip.data.builtin.render import OVERSIZE, rasterize

EMOJIBASE, EMOJILIB = "emojibase-data", "emojilib"
TEXT_PACKAGES = {EMOJIBASE: "17.0.0", EMOJILIB: "4.0.3"}
"""Version by name; the names of emoji are the classes of the test, and so must not change under it."""


@dataclass(frozen=True)
class Design:
    """A designer's set: name in keys and tables, npm package, its version, and the sentence that its license asks for.

    A newer version may draw other emoji and so change the test.
    """

    key: str
    package: str
    version: str
    credit: str
    spelled: bool = True
    """Whether the names of its drawings are written as words and so serve as captions."""


DESIGNS = (
    Design("noto", "@iconify-json/noto", "1.2.9", "Noto Emoji by Google, Apache-2.0"),
    Design("noto-v1", "@iconify-json/noto-v1", "1.2.5", "Noto Emoji v1 by Google, Apache-2.0"),
    Design("twemoji", "@iconify-json/twemoji", "1.2.5", "Twemoji by Twitter and contributors, CC-BY-4.0"),
    Design("fxemoji", "@iconify-json/fxemoji", "1.2.2", "FxEmoji by Mozilla, Apache-2.0", spelled=False),
    Design("emojione-v2", "@iconify-json/emojione", "1.2.3", "EmojiOne v2 by EmojiOne, CC-BY-4.0"),
    Design("emojione-v1", "@iconify-json/emojione-v1", "1.2.3", "EmojiOne v1 by EmojiOne, CC-BY-SA-4.0"),
    Design("openmoji", "@iconify-json/openmoji", "1.2.29", "OpenMoji by the OpenMoji project, CC-BY-SA-4.0"),
    Design("fluent", "@iconify-json/fluent-emoji-flat", "1.2.6", "Fluent Emoji by Microsoft, MIT"),
)
PACKAGE_OF = {design.key: design.package for design in DESIGNS}
TRAINING = ("noto", "noto-v1", "twemoji", "fxemoji", "emojione-v2")


class Emoji(BuiltinSet):
    """The emoji: in the order of the designers, then as Unicode orders emoji."""

    name, layout, effort = "emoji", 3, "17 MB to fetch, about a minute"
    side = 96  # a view of a 64 px model that shows 44 % of the drawing still has a pixel for each of the model's
    packages = NpmPackages(TEXT_PACKAGES | {design.package: design.version for design in DESIGNS})
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
        concepts, layers = read_concepts(packages)
        sets = {design: IconSet(packages[design.package].folder) for design in DESIGNS}
        layers.insert(1, charted_names(sets.values(), concepts))
        drawings = {design: match(icons, concepts, layers) for design, icons in sets.items()}
        for design, icons in sets.items():
            for code, drawing in drawings[design].items() if design.spelled else ():
                names = (name.replace("-", " ") for name in (drawing, *icons.other_names(drawing)))
                concepts[code].names += [name.replace("flag for flag", "flag for") for name in names]
        tidy(concepts)
        return [
            {"key": f"{design.key}/{code}", "design": design.key, "drawing": names[code], **concept.row()}
            for design, names in drawings.items()
            for code, concept in concepts.items()
            if code in names
        ]

    def pixels(self, row: Row, packages: Packages) -> np.ndarray:
        icons = icon_set(packages[PACKAGE_OF[row["design"]]].folder)
        return rasterize(icons.svg(row["drawing"], OVERSIZE * self.side), self.side)

    def notice(self, packages: Packages, rows: list[Row]) -> str:
        drawn = Counter(row["design"] for row in rows)
        lines = ["The drawings in this folder belong to others. Show these lines wherever you show a drawing.", ""]
        for design in DESIGNS:
            license, url, source = _origin(packages[design.package])
            lines += [
                f"{design.credit}: {drawn[design.key]} drawings, rendered at {self.side} px over white, "
                "margins cut off.",
                f"  from {source} through {design.package} {packages[design.package].version}",
                f"  licence: {license} {url}",
            ]
        lines += ["", "Names and keywords:"]
        for name in TEXT_PACKAGES:
            license, _, source = _origin(packages[name])
            lines.append(f"  {name} {packages[name].version}, {license}, {source}")
        return "\n".join(lines) + "\n"


EMOJI = Emoji()


def _origin(package: Package) -> tuple[str, str, str]:
    """License, its address and the source of a package, from its own files."""
    described = read_json(package.folder / "package.json")
    info = read_json(package.folder / "info.json") if (package.folder / "info.json").exists() else {}
    license, author = info.get("license", {}), info.get("author", {})
    source = author.get("url", "") or described.get("homepage", "")
    return license.get("spdx") or described.get("license", ""), license.get("url", ""), source


# Concepts: the names and keywords of emoji, from two text packages.

SHORT_NAMES = ("emojibase", "iamcal", "github", "joypixels")
"""Short names as chat programs write them, best English first."""

PARTS = 2
"""emojibase's group of what is no emoji by itself: skin tones and hair."""

NO_PHRASE = re.compile(r"^flag \w\w$|\b[bgmw]{2,4}$|\bu[0-9a-f]{4}\b|[a-z]\d|[<>:;=\\/]")
"""Codes and emoticons: "flag fr", "family wg" (woman, girl), "u6307", "clock10", ":D"."""


@dataclass
class Concept:
    """One emoji: the thing that all its drawings show, by its code (see `code_of`) and CLDR name."""

    code: str
    name: str
    category: str
    names: list[str] = field(default_factory=list)
    """Further names, each of this concept alone."""
    keywords: list[str] = field(default_factory=list)
    """Words and short phrases that many concepts share."""

    def row(self) -> Row:
        """The columns that all drawings of the concept share."""
        group = group_of(self.name)
        return {
            "code": self.code,
            "name": self.name,
            "category": self.category,
            "group": group,
            "held_out": is_held_out(group),
            "captions": [self.name, *self.names],
            "keywords": self.keywords,
        }


def code_of(text: str) -> str:
    """The code of an emoji, given as characters or in hexadecimal: its code points joined by "-", without FE0F."""
    plain = text if text.isascii() else "-".join(f"{ord(letter):04x}" for letter in text)
    return "-".join(part for part in plain.lower().split("-") if part != "fe0f")


def squash(name: str) -> str:
    """A name as its letters and digits alone, so that every way of writing it is the same."""
    plain = unicodedata.normalize("NFKD", name.replace("&", "and")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9#*]", "", plain)


def read_concepts(packages: Packages) -> tuple[dict[str, Concept], list[dict[str, str]]]:
    """Read all emoji but skin tones and lone letters of flags.

    Returns:
        The concepts by code, and the names that tell a concept: dictionaries from squashed name to code, most
        trustworthy first.
    """
    base = packages[EMOJIBASE].folder
    groups = read_json(base / "meta/groups.json")["groups"]
    concepts = {}
    for row in read_json(base / "en/data.json"):
        if row.get("group", PARTS) != PARTS:
            code, category = code_of(row["hexcode"]), groups[str(row["group"])].replace("-", " ")
            concepts[code] = Concept(code, row["label"], category, keywords=list(row.get("tags", [])))
    layers = [{squash(concept.name): code for code, concept in concepts.items()}]

    def add_names(named: Iterable[tuple[str, list[str]]]) -> None:
        """Give concepts further names, and add the layer that finds a concept by them."""
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
    for emoji, words in read_json(packages[EMOJILIB].folder / "dist/emoji-en-US.json").items():
        if concept := concepts.get(code_of(emoji)):
            concept.keywords += [word.replace("_", " ") for word in words]
    return concepts, layers


def is_phrase(text: str) -> bool:
    """Whether it reads as English."""
    return bool(re.search(r"[a-z]{3}", text.lower())) and not NO_PHRASE.search(text)


def tidy(concepts: Mapping[str, Concept]) -> None:
    """Keep names and keywords that read as English, once each; a name that several concepts have tells none of them."""
    for concept in concepts.values():
        for texts in (concept.names, concept.keywords):
            texts[:] = [" ".join(text.replace("_", " ").split()) for text in texts]
    owners = Counter(key for c in concepts.values() for key in {squash(n) for n in [c.name, *c.names]})
    for concept in concepts.values():
        own = [name for name in concept.names if is_phrase(name) and owners[squash(name)] == 1]
        concept.names = distinct(own, [concept.name])
        concept.keywords = distinct(filter(is_phrase, concept.keywords), [concept.name, *concept.names])


def distinct(texts: Iterable[str], but: Iterable[str] = ()) -> list[str]:
    """The texts in their order without repetitions, and without those in `but`, however they are written."""
    known = {squash(text) for text in but}
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(squash(text), text)
    return [text for key, text in first.items() if key not in known]


# Groups: emoji that are variants of one another, and the groups held out of training.

HELD_OUT_FRACTION = 0.2

SALT = "30"
"""The smallest number for which 309 of the unseen designer's 1,594 concepts are new, as the data's description says,
and the country flags, one group of 262 that this designer does not draw, are not."""

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
"""Groups that a pattern over the whole name tells best; the first that fits counts."""

VARIANTS = re.compile(
    r"\b(mr|mrs|ms|mx|man|men|woman|women|people|person|child|adult"
    r"|red|orange|yellow|green|blue|light blue|purple|brown|black|grey|white|pink"
    r"|left|right|up|down|leftwards|rightwards|upwards|downwards|clockwise|counterclockwise"
    r"|small|medium|large|not)\b(?!’)"
)
"""Words in which only variants differ: gender, color, direction, size."""


def group_of(name: str) -> str:
    """The part of a CLDR name that all variants share: "running" of "woman running", "heart" of "green heart".

    Gender, color, direction, size, hour and country are taken away.
    """
    name = name.lower()
    for pattern, group in FAMILIES.items():
        if re.fullmatch(pattern, name):
            return group
    common = re.sub(r"[^\w’]+", " ", VARIANTS.sub(" ", name.split(":")[0])).strip()
    return common or ("person" if VARIANTS.fullmatch(name) else name)


def is_held_out(group: str) -> bool:
    """Whether a group is among the fifth kept out of training: by a hash of its name, so that it never changes."""
    digest = hashlib.sha256(f"{SALT}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64


# Drawings: the sets of one designer each, in Iconify's format, and the emoji that each drawing shows.

BOX = ("left", "top", "width", "height")


class IconSet:
    """The drawings of one designer, in Iconify's format: a file of an unpacked `@iconify-json` package, or of
    `@iconify/json`."""

    def __init__(self, folder: Path, file: str = "icons.json") -> None:
        data = read_json(folder / file)
        self.prefix: str = data["prefix"]
        self.box = {"left": 0, "top": 0, "width": 16, "height": 16} | {n: data[n] for n in BOX if n in data}
        self.categories: dict[str, list[str]] = data.get("categories", {})
        self.icons: dict[str, dict[str, Any]] = {n: i for n, i in data["icons"].items() if not i.get("hidden")}
        self.aliases: dict[str, dict[str, Any]] = data.get("aliases", {})
        self._same: dict[str, list[str]] = {}
        for name, alias in self.aliases.items():
            if alias.keys() == {"parent"}:
                self._same.setdefault(alias["parent"], []).append(name)
        chars = folder / "chars.json"
        self.chars: dict[str, str] = read_json(chars) if chars.exists() else {}

    def other_names(self, icon: str) -> list[str]:
        """Other names of the same drawing, neither turned nor mirrored."""
        return self._same.get(icon, [])

    def svg(self, name: str, side: int) -> str:
        """The drawing as an SVG document of `side` by `side` pixels, its shape kept."""
        icon = self.icons[name]
        box = " ".join(str(icon.get(edge, self.box[edge])) for edge in BOX)
        return (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{side}" height="{side}" viewBox="{box}">{icon["body"]}</svg>'
        )


icon_set = lru_cache(maxsize=1)(IconSet)
"""The set that was read last: drawings are rendered set by set."""


def corrections(prefix: str) -> dict[str, str | None]:
    """Codes of a set's drawings whose names tell the wrong emoji or none; None for a drawing that is damaged."""
    file = resources.files("declip.data") / "assets" / f"{prefix}.tsv"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else ()
    return {name: None if emoji == "-" else code_of(emoji) for name, emoji in (line.split("\t") for line in lines)}


def charted_names(sets: Iterable[IconSet], codes: Iterable[str]) -> dict[str, str]:
    """Codes by squashed name, from the sets that come with a table of code points."""
    known = set(codes)
    layer: dict[str, str] = {}
    for icons in sets:
        for char, name in icons.chars.items():
            if (code := code_of(char)) in known:
                for other in (name, *icons.other_names(name)):
                    layer.setdefault(squash(other), code)
    return layer


def match(icons: IconSet, codes: Iterable[str], layers: list[dict[str, str]]) -> dict[str, str]:
    """Find which drawing shows which emoji.

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
    for char, name in icons.chars.items():
        if name in left:
            take(code_of(char), name)
    for layer in layers if not icons.chars else ():
        for names_of in (lambda name: [name], icons.other_names):
            for name in list(left):
                keys = [squash(re.sub(r"^flag-for-(flag-)?", "flag-", other)) for other in names_of(name)]
                take(next((layer[key] for key in keys if layer.get(key) in free), None), name)
    return drawing_of
