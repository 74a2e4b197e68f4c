"""`builtin:clipart`: drawings of the Open Clip Art Library, with titles and keywords.

By many artists: another source than emoji and icons, for transfer.
"""

import re
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from declip.data.builtin.fetch import DebianPackage, Packages
from declip.data.builtin.icons import is_readable
from declip.data.builtin.pictures import BuiltinSet, Row, Selection
from declip.data.builtin.render import rasterize_page

LICENSE = "public domain"


class Clipart(BuiltinSet):
    """The clip art: by path; the class of a drawing is its title, and several drawings may be of one class."""

    name, layout, effort = "clipart", 1, "25 MB to fetch, about a minute"
    side = 96
    packages = DebianPackage("openclipart-svg", "usr/share/openclipart/svg", "25 MB")
    splits = ("clipart",)

    def select(self, split: str, table: list[Row]) -> Selection:
        return Selection(table, f"Open Clip Art Library 0.18 and its contributors, {LICENSE}", "title")

    def choose(self, packages: Packages) -> list[Row]:
        return read_clipart(packages[self.packages.name].folder)

    def pixels(self, row: Row, packages: Packages) -> np.ndarray | None:
        path = packages[self.packages.name].folder / row["key"]
        try:
            return rasterize_page(path.read_text(encoding="utf-8"), self.side)
        except ValueError:
            return None

    def notice(self, packages: Packages, rows: list[Row]) -> str:
        package = f"Debian's {self.packages.name} {packages[self.packages.name].version}"
        return (
            f"{len(rows)} drawings of the Open Clip Art Library, by the authors that the table names, dedicated to "
            f"the\npublic domain; from {package}, drawn at {self.side} px over white,\n"
            "margins cut off. The package's own notice is in licences/.\n"
        )


CLIPART = Clipart()

DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
WORK = "{http://web.resource.org/cc/}Work"
LICENSE_TAG = "{http://web.resource.org/cc/}license"

LEFT_OUT = (
    "shapes/stars/", "special/", "computer/icons/", "computer/buttons/", "buttons/", "signs_and_symbols/flags/",
    "signs_and_symbols/led/", "logos/", "shapes/jigsaw/", "recreation/games/cards/",
)  # fmt: skip
"""Series of geometric figures and patterns, desktop themes, flags, logos and playing cards."""

TITLE_OF_A_SERIES = 4
"""A title that more drawings have is that of their series."""

SERIES = re.compile(r"\b(collection|clip ?arts?|theme|iconset|icons)\b", re.IGNORECASE)
"""Words in the title of a series."""

SMALL_WORDS = frozenset(("a", "an", "the", "of", "and", "with", "without", "in", "on", "for", "to", "from", "by", "at"))
"""Words that WordNet, a dictionary of nouns, verbs, adjectives and adverbs, does not have."""


def read_clipart(folder: Path) -> list[Row]:
    """Rows by path of the drawings whose title, or else file name, reads as English and that are no stamps."""
    written = dict(_metadata(folder))
    series = Counter(title for title, *_ in written.values())
    stamps = also_stamps()
    rows = []
    for key, (title, keywords, author) in written.items():
        words = title_words(title)
        if series[title] > TITLE_OF_A_SERIES or SERIES.search(title) or not is_readable(words, SMALL_WORDS):
            words = file_words(key, author)
        if is_readable(words, SMALL_WORDS) and key not in stamps:
            title = " ".join(words)
            rows.append(
                {
                    "key": key,
                    "title": title,
                    "category": key.split("/")[0].replace("_", " "),
                    "author": author,
                    "licence": LICENSE,
                    "captions": [title],
                    "keywords": [word for word in keywords if word != title],
                }
            )
    return rows


def also_stamps() -> set[str]:
    """Drawings that the stamps of Tux Paint have too."""
    text = resources.files("declip.data").joinpath("assets", "clipart-stamps.txt").read_text(encoding="utf-8")
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def title_words(title: str) -> list[str]:
    """The words of a title, without numbers and remarks in brackets."""
    return re.findall(r"[a-z]+", re.sub(r"\(.*?\)|\d+|'s\b", " ", title.lower()))


def file_words(key: str, author: str) -> list[str]:
    """The words of a file's name up to its author's, such as ("blue", "gun") in "blue_gun_alex_fernandez_01.svg"."""
    words = re.findall(r"[a-z]+", Path(key).stem.lower())
    names = re.findall(r"[a-z]+", author.lower())
    end = next((i for i, word in enumerate(words) if i and any(n.startswith(word) for n in names)), len(words))
    return words[:end]


def _metadata(folder: Path) -> Iterator[tuple[str, tuple[str, list[str], str]]]:
    """Title, keywords and author by key, of the files in the public domain."""
    for path in sorted(folder.rglob("*.svg"), key=lambda path: path.relative_to(folder).as_posix()):
        key = path.relative_to(folder).as_posix()
        if path.is_symlink() or key.startswith(LEFT_OUT):
            continue
        try:
            work = ElementTree.parse(path).getroot().find(f".//{WORK}")
        except ElementTree.ParseError:
            continue
        licenses = () if work is None else (str(e.get(f"{RDF}resource")).lower() for e in work.iter(LICENSE_TAG))
        if work is None or not any("publicdomain" in license for license in licenses):
            continue
        subjects = (" ".join((e.text or "").replace("_", " ").split()) for e in work.iterfind(f".//{RDF}li"))
        keywords = dict.fromkeys(word for word in subjects if re.fullmatch(r"[a-z][a-z ]+", word) and word != "hash")
        author = work.findtext(f"{DUBLIN_CORE}creator//{DUBLIN_CORE}title") or ""
        title = " ".join((work.findtext(f"{DUBLIN_CORE}title") or "").split())
        yield key, (title, list(keywords), author)
