"""Properties of captions: words, tokens, scripts, and texts that describe nothing."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import regex

from declip.data.text.augment import STOP_WORDS
from declip.data.text.tokenizer import Tokenizer

EXAMPLES = 3
"""Captions kept of each kind."""

LONGEST_EXAMPLE = 120
"""Characters of a caption that is kept as an example."""

_ENDINGS = "jpe?g|png|gif|webp|tiff?|bmp|hei[cf]|svg|raw|cr2|nef|dng|psd|pdf|mp4|mov|avi"
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)\p{L}*\.?"
KINDS = {
    "web address": regex.compile(r"(?:https?://|www\.)\S+", regex.I),
    "file name": regex.compile(
        rf"[^,;?!]*\.(?:{_ENDINGS})|(?:img|dsc[fn]?|dcim|pict|mvi|sam|pxl|wp|screenshot|image|photo|scan|untitled)"
        r"[\s_\-#.(]*\d[\d\s_\-().]*",
        regex.I,
    ),
    "date": regex.compile(
        rf"\d{{1,4}}([-/.:])\d{{1,2}}\1\d{{1,4}}(?:[ t]\d\d?:\d\d.*)?"
        rf"|(?:\d{{1,2}}\.? )?{_MONTH}(?: \d{{1,2}},?)? \d{{4}}",
        regex.I,
    ),
    "number": regex.compile(r"(?=.*\p{N})[\p{N}\W_]+"),
}
"""Texts that do not describe an image; a caption is of the first kind that matches it completely."""

NO_LETTER, ONE_WORD = "no letter", "one word"
_LETTER = regex.compile(r"\p{L}")
_WORD = regex.compile(r"[\p{L}\p{N}]+(?:['’\-][\p{L}\p{N}]+)*")
SCRIPTS = (
    "Latin", "Cyrillic", "Greek", "Han", "Hiragana", "Katakana", "Hangul", "Arabic", "Hebrew", "Devanagari", "Bengali",
    "Tamil", "Telugu", "Thai", "Georgian", "Armenian", "Ethiopic", "Khmer", "Myanmar", "Sinhala",
)  # fmt: skip
"""Unicode's names of the scripts that are distinguished."""
_SCRIPTS = [(name, regex.compile(rf"\p{{Script={name}}}")) for name in SCRIPTS]


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    """CLIP's tokenizer without truncation."""
    return Tokenizer(context=1 << 30)


def token_count(caption: str) -> int:
    """CLIP tokens of a caption, start and end included, nothing truncated."""
    return len(_tokenizer().encode(caption))


def kind_of(caption: str) -> str | None:
    """Classify a caption: one of `KINDS`, "no letter", "one word", or None for several words."""
    for name, pattern in KINDS.items():
        if pattern.fullmatch(caption):
            return name
    if not _LETTER.search(caption):
        return NO_LETTER
    return None if " " in caption else ONE_WORD


def script_of(caption: str) -> str | None:
    """The script of most of a caption's letters, "other" for one not in `SCRIPTS`, None when it has no letter."""
    if caption.isascii():
        return "Latin" if _LETTER.search(caption) else None
    found = Counter(map(_script, _LETTER.findall(caption)))
    return found.most_common(1)[0][0] if found else None


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    return next((name for name, pattern in _SCRIPTS if pattern.match(letter)), "other")


def telling_words(caption: str) -> Iterator[str]:
    """The distinct words of a caption in lower case, without stop words."""
    return iter(set(_WORD.findall(caption.lower())) - STOP_WORDS)


@dataclass
class CaptionCounts:
    """Counts over many captions.

    Attributes:
        kinds: Captions by `kind_of`, several words left out.
        examples: The first few of each kind.
        scripts: Captions by `script_of`.
        words: Captions that each telling word is in. Beyond `MOST_WORDS` different ones the rarer half is dropped, so
            that memory stays bounded: the most frequent are exact, a rare word's count may be too low.
    """

    MOST_WORDS = 200_000

    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    scripts: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)

    def add(self, caption: str) -> None:
        """Count one caption."""
        if kind := kind_of(caption):
            self.kinds[kind] += 1
            self._keep(kind, caption[:LONGEST_EXAMPLE])
        if script := script_of(caption):
            self.scripts[script] += 1
        self.words.update(telling_words(caption))

    def merge(self, other: "CaptionCounts") -> None:
        """Add the counts of further captions."""
        self.kinds.update(other.kinds)
        self.scripts.update(other.scripts)
        self.words.update(other.words)
        for kind, texts in other.examples.items():
            for text in texts:
                self._keep(kind, text)
        if len(self.words) > self.MOST_WORDS:
            self.words = Counter(dict(self.words.most_common(self.MOST_WORDS // 2)))

    def _keep(self, kind: str, text: str) -> None:
        kept = self.examples.setdefault(kind, [])
        if len(kept) < EXAMPLES and text not in kept:
            kept.append(text)
