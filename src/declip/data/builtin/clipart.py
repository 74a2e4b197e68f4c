"""`builtin:clipart`: drawings of the Open Clip Art Library, with titles and keywords.

By many artists: another source than emoji and icons, for transfer.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterator
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from declip.data.builtin.fetch import DebianPackage, Packages
from declip.data.builtin.pictures import BuiltinSet, Row, Selection
from declip.data.builtin.render import rasterize_page
from declip.data.text.synonyms import is_word

LICENSE = "public domain"
CREDIT = f"Open Clip Art Library 0.18 and its contributors, {LICENSE}"


class Clipart(BuiltinSet):
    """The clip art: by path; the class of a drawing is its title, and several drawings may be of one class."""

    name, layout, effort = "clipart", 1, "25 MB to fetch, about a minute"
    side = 96
    packages = DebianPackage("openclipart-svg", "usr/share/openclipart/svg")
    splits = ("clipart",)

    def select(self, split: str, table: list[Row]) -> Selection:
        return Selection(table, CREDIT, "title")

    def choose(self, packages: Packages) -> list[Row]:
        return read_clipart(packages[self.packages.name].folder)

    def pixels(self, row: Row, packages: Packages) -> np.ndarray | None:
        path = packages[self.packages.name].folder / row["key"]
        try:
            return rasterize_page(path.read_text(encoding="utf-8"), self.side)
        except ValueError:
            return None

    def credits(self, packages: Packages, rows: list[Row]) -> list[str]:
        return [f"{len(rows)} drawings: {CREDIT}, named in pairs.parquet"]


CLIPART = Clipart()

DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
COMMONS = "{http://web.resource.org/cc/}"

LEFT_OUT = (
    "shapes/stars/", "special/", "computer/icons/", "computer/buttons/", "buttons/", "signs_and_symbols/flags/",
    "signs_and_symbols/led/", "logos/", "shapes/jigsaw/", "recreation/games/cards/",
)  # fmt: skip
"""Series of geometric figures and patterns, desktop themes, flags, logos and playing cards."""

TITLE_OF_A_SERIES = 4
"""A title that more drawings have is that of their series."""

MOST_WORDS = 5
"""Longer titles tell a story."""

SERIES = re.compile(r"\b(collection|clip ?arts?|theme|iconset|icons)\b", re.IGNORECASE)
"""Words in the title of a series."""

SMALL_WORDS = frozenset(("a", "an", "the", "of", "and", "with", "without", "in", "on", "for", "to", "from", "by", "at"))
"""Words that WordNet, a dictionary of nouns, verbs, adjectives and adverbs, does not have."""


def read_clipart(folder: Path) -> list[Row]:
    """Rows by path of the drawings whose title, or else file name, reads as English and that are no stamps."""
    rows, chosen = list(_described(folder)), []
    series, stamps = Counter(row["title"] for row in rows), also_stamps()
    for row in rows:
        words = title_words(row["title"])
        named_as_series = series[row["title"]] > TITLE_OF_A_SERIES or SERIES.search(row["title"])
        if named_as_series or not is_readable(words, SMALL_WORDS):
            words = file_words(row["key"], row["author"])
        if is_readable(words, SMALL_WORDS) and row["key"] not in stamps:
            title = " ".join(words)
            keywords = [word for word in row["keywords"] if word != title]
            chosen.append(row | {"title": title, "captions": [title], "keywords": keywords})
    return chosen


def also_stamps() -> set[str]:
    """Drawings that the stamps of Tux Paint have too."""
    text = resources.files("declip.data").joinpath("assets", "clipart-stamps.txt").read_text(encoding="utf-8")
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def is_readable(words: list[str], common: Collection[str]) -> bool:
    """Whether the words are WordNet's or among the `common` ones, and one of them has two letters or more."""
    if not 0 < len(words) <= MOST_WORDS or not any(len(word) > 1 and word.isalpha() for word in words):
        return False
    return all(word in common or (word.isalpha() and (len(word) == 1 or is_word(word))) for word in words)


def title_words(title: str) -> list[str]:
    """The words of a title, without numbers and remarks in brackets."""
    return re.findall(r"[a-z]+", re.sub(r"\(.*?\)|\d+|'s\b", " ", title.lower()))


def file_words(key: str, author: str) -> list[str]:
    """The words of a file's name up to its author's, such as ("blue", "gun") in "blue_gun_alex_fernandez_01.svg"."""
    words = re.findall(r"[a-z]+", Path(key).stem.lower())
    names = re.findall(r"[a-z]+", author.lower())
    end = next((i for i, word in enumerate(words) if i and any(n.startswith(word) for n in names)), len(words))
    return words[:end]


def _described(folder: Path) -> Iterator[Row]:
    """Rows of the files in the public domain, as their metadata describes them."""
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.svg") if not path.is_symlink()}
    for key, path in sorted(paths.items()):
        if key.startswith(LEFT_OUT):
            continue
        try:
            work = ElementTree.parse(path).getroot().find(f".//{COMMONS}Work")
        except ElementTree.ParseError:
            continue
        licenses = () if work is None else work.iter(f"{COMMONS}license")
        if work is None or not any("publicdomain" in str(e.get(f"{RDF}resource")).lower() for e in licenses):
            continue
        subjects = (" ".join((e.text or "").replace("_", " ").split()) for e in work.iterfind(f".//{RDF}li"))
        keywords = dict.fromkeys(word for word in subjects if re.fullmatch(r"[a-z][a-z ]+", word) and word != "hash")
        yield {
            "key": key,
            "title": " ".join((work.findtext(f"{DUBLIN_CORE}title") or "").split()),
            "category": key.split("/")[0].replace("_", " "),
            "author": work.findtext(f"{DUBLIN_CORE}creator//{DUBLIN_CORE}title") or "",
            "licence": LICENSE,
            "captions": [],
            "keywords": list(keywords),
        }
