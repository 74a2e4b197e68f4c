"""What emoji mean: their names and keywords, from two text packages."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EMOJIBASE, EMOJILIB = "emojibase-data", "emojilib"
TEXT_PACKAGES = {EMOJIBASE: "17.0.0", EMOJILIB: "4.0.3"}
"""Version by name; the names of emoji are the classes of the test, and so must not change under it."""
SHORT_NAMES = ("emojibase", "iamcal", "github", "joypixels")
"""Short names as chat programs write them, best English first."""

PARTS = 2
"""emojibase's group of what is no emoji by itself: skin tones and hair."""


@dataclass
class Concept:
    """One emoji: what all its drawings show.

    Attributes:
        code: Its code points in hexadecimal, joined by "-", without the variation selector FE0F.
        name: The CLDR name.
        category: Such as "animals nature".
        names: Further names, each of this concept alone.
        keywords: Words and short phrases that many concepts share.
    """

    code: str
    name: str
    category: str
    names: list[str] = field(default_factory=list)
    keywords: list[str] = field(default_factory=list)


def code_of(text: str) -> str:
    """The code of an emoji given as characters or, joined by "-", as hexadecimal numbers."""
    plain = text if text.isascii() else "-".join(f"{ord(letter):04x}" for letter in text)
    return "-".join(part for part in plain.lower().split("-") if part != "fe0f")


def squash(name: str) -> str:
    """A name as its letters and digits alone, so that every way of writing it is the same."""
    plain = unicodedata.normalize("NFKD", name.replace("&", "and")).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9#*]", "", plain)


def read_json(path: Path) -> Any:
    """Read a JSON file of a package."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_concepts(packages: Path) -> tuple[dict[str, Concept], list[dict[str, str]]]:
    """Read all emoji but skin tones and lone letters of flags.

    Args:
        packages: Folder of unpacked packages, by name.

    Returns:
        The concepts by code, and the names that tell a concept: dictionaries from squashed name to code, most
        trustworthy first.
    """
    base = packages / EMOJIBASE
    groups = read_json(base / "meta/groups.json")["groups"]
    rows = [row for row in read_json(base / "en/data.json") if row.get("group", PARTS) != PARTS]
    concepts = {}
    for row in rows:
        code = code_of(row["hexcode"])
        category = groups[str(row["group"])].replace("-", " ")
        concepts[code] = Concept(code, row["label"], category, keywords=list(row.get("tags", [])))
    layers = [{squash(concept.name): code for code, concept in concepts.items()}]
    formal = read_json(base / "meta/unicode-names.json").items()
    _add_names(concepts, layers, ((code_of(c), [name.lower()]) for c, name in formal if "-" not in c))
    for kind in SHORT_NAMES:
        path = base / f"en/shortcodes/{kind}.json"
        written = ((code_of(code), names) for code, names in read_json(path).items())
        _add_names(concepts, layers, ((c, _words([n] if isinstance(n, str) else n)) for c, n in written))
    for emoji, words in read_json(packages / EMOJILIB / "dist/emoji-en-US.json").items():
        if concept := concepts.get(code_of(emoji)):
            concept.keywords += [word.replace("_", " ") for word in words]
    return concepts, layers


def _words(names: list[str]) -> list[str]:
    """Short names as words: "male-doctor" and "male_doctor" both stand for "male doctor"."""
    return [name.replace("-", " ").replace("_", " ") for name in names]


def _add_names(
    concepts: Mapping[str, Concept], layers: list[dict[str, str]], named: Iterable[tuple[str, list[str]]]
) -> None:
    """Give concepts further names, and add the layer that finds a concept by them."""
    layer: dict[str, str] = {}
    for code, names in named:
        if code in concepts:
            concepts[code].names += names
            for name in names:
                layer.setdefault(squash(name), code)
    layers.append(layer)


NO_PHRASE = re.compile(r"^flag \w\w$|\b[bgmw]{2,4}$|\bu[0-9a-f]{4}\b|[a-z]\d|[<>:;=\\/]")
"""Codes and emoticons: "flag fr", "family wg" (woman, girl), "u6307", "clock10", ":D"."""


def is_phrase(text: str) -> bool:
    """Whether it reads as English."""
    return bool(re.search(r"[a-z]{3}", text.lower())) and not NO_PHRASE.search(text)


def tidy(concepts: Mapping[str, Concept]) -> None:
    """Keep names and keywords that read as English, once each; a name that several concepts have tells none of them.

    Args:
        concepts: All concepts by code; changed in place.
    """
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
    seen = {squash(text) for text in but}
    kept = []
    for text in texts:
        if squash(text) not in seen:
            seen.add(squash(text))
            kept.append(text)
    return kept
