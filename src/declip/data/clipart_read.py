"""What the drawings of the Open Clip Art Library show: titles and keywords from their metadata."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from xml.etree import ElementTree

from declip.data.icons_names import is_readable

DUBLIN_CORE = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
WORK = "{http://web.resource.org/cc/}Work"
LICENCE = "{http://web.resource.org/cc/}license"

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
"""What WordNet, a dictionary of nouns, verbs, adjectives and adverbs, has not."""


@dataclass(frozen=True)
class Drawing:
    """A drawing.

    Attributes:
        key: Its path below the package's folder.
        title: What it shows, in words.
        category: Its uppermost folder.
        keywords: Words and short phrases.
        author: Who drew it.
    """

    key: str
    title: str
    category: str
    keywords: tuple[str, ...]
    author: str


def read_clipart(folder: Path) -> list[Drawing]:
    """Read the drawings whose title, or else file name, reads as English, by path; those among the stamps left out.

    Args:
        folder: The package's folder `svg`.
    """
    written = dict(_metadata(folder))
    series = Counter(title for title, *_ in written.values())
    stamps = also_stamps()
    drawings = []
    for key, (title, keywords, author) in written.items():
        words = title_words(title)
        if series[title] > TITLE_OF_A_SERIES or SERIES.search(title) or not is_readable(words, SMALL_WORDS):
            words = file_words(key, author)
        if is_readable(words, SMALL_WORDS) and key not in stamps:
            drawings.append(Drawing(key, " ".join(words), key.split("/")[0].replace("_", " "), keywords, author))
    return drawings


def also_stamps() -> set[str]:
    """Drawings that the stamps of Tux Paint have too."""
    text = resources.files("declip.data").joinpath("assets", "clipart-stamps.txt").read_text(encoding="utf-8")
    return {line for line in text.splitlines() if line and not line.startswith("#")}


def title_words(title: str) -> list[str]:
    """The words of a title, without numbers and what stands in brackets."""
    return re.findall(r"[a-z]+", re.sub(r"\(.*?\)|\d+|'s\b", " ", title.lower()))


def file_words(key: str, author: str) -> list[str]:
    """The words of a file's name up to its author's, such as ("blue", "gun") in "blue_gun_alex_fernandez_01.svg"."""
    words = re.findall(r"[a-z]+", Path(key).stem.lower())
    names = re.findall(r"[a-z]+", author.lower())
    end = next((i for i, word in enumerate(words) if i and any(n.startswith(word) for n in names)), len(words))
    return words[:end]


def _metadata(folder: Path) -> Iterator[tuple[str, tuple[str, tuple[str, ...], str]]]:
    """Title, keywords and author by key, of the files in the public domain."""
    for path in sorted(folder.rglob("*.svg"), key=lambda path: path.relative_to(folder).as_posix()):
        key = path.relative_to(folder).as_posix()
        if path.is_symlink() or key.startswith(LEFT_OUT):
            continue
        try:
            work = ElementTree.parse(path).getroot().find(f".//{WORK}")
        except ElementTree.ParseError:
            continue
        if work is None or not any("publicdomain" in str(e.get(f"{RDF}resource")).lower() for e in work.iter(LICENCE)):
            continue
        subjects = (" ".join((e.text or "").replace("_", " ").split()) for e in work.iterfind(f".//{RDF}li"))
        keywords = tuple(dict.fromkeys(word for word in subjects if re.fullmatch(r"[a-z][a-z ]+", word)))
        author = work.findtext(f"{DUBLIN_CORE}creator//{DUBLIN_CORE}title") or ""
        title = " ".join((work.findtext(f"{DUBLIN_CORE}title") or "").split())
        yield key, (title, tuple(word for word in keywords if word != "hash"), author)
