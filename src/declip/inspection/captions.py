"""Properties of captions: words, tokens, scripts, and texts that describe nothing."""

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache

import regex

from declip.data.text.tokenizer import Tokenizer

EXAMPLES, LONGEST_EXAMPLE = 3, 120
"""Captions kept of each kind, and characters of each."""

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
    "no letter": regex.compile(r"[^\p{L}]*"),
    "one word": regex.compile(r"[^ ]*"),
}
"""Texts that do not describe an image; a caption is of the first kind that matches it completely."""

ONE_WORD = "one word"
_LETTER = regex.compile(r"\p{L}")


@lru_cache(maxsize=1)
def _tokenizer() -> Tokenizer:
    return Tokenizer(context=1 << 30)


def token_count(caption: str) -> int:
    """CLIP tokens of a caption, start and end included, nothing truncated."""
    return len(_tokenizer().encode(caption))


def kind_of(caption: str) -> str | None:
    """Classify a caption: one of `KINDS`, or None for several words."""
    return next((name for name, pattern in KINDS.items() if pattern.fullmatch(caption)), None)


def script_of(caption: str) -> str | None:
    """The script of most of a caption's letters, such as "Latin" or "Han"; None when it has no letter."""
    letters = _LETTER.findall(caption)
    if not letters or caption.isascii():
        return "Latin" if letters else None
    return Counter(map(_script, letters)).most_common(1)[0][0]


@lru_cache(maxsize=1 << 14)
def _script(letter: str) -> str:
    """The first word of a letter's Unicode name; only Han characters are named otherwise."""
    return unicodedata.name(letter, "other").split()[0].capitalize().replace("Cjk", "Han")


@dataclass
class CaptionCounts:
    """Captions by `kind_of`, with the first few examples of each kind, and by `script_of`."""

    kinds: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    scripts: Counter[str] = field(default_factory=Counter)

    def add(self, caption: str) -> None:
        """Count one caption."""
        if kind := kind_of(caption):
            self.kinds[kind] += 1
            self._keep(kind, caption[:LONGEST_EXAMPLE])
        if script := script_of(caption):
            self.scripts[script] += 1

    def merge(self, other: "CaptionCounts") -> None:
        """Add the counts of further captions."""
        self.kinds.update(other.kinds)
        self.scripts.update(other.scripts)
        for kind, texts in other.examples.items():
            for text in texts:
                self._keep(kind, text)

    def _keep(self, kind: str, text: str) -> None:
        kept = self.examples.setdefault(kind, [])
        if len(kept) < EXAMPLES and text not in kept:
            kept.append(text)
