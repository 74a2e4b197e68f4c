"""Properties of captions: tokens, and texts that do not describe an image."""

import regex

from declip.data.text.tokenizer import Tokenizer

OTHER_SCRIPT, ONE_WORD = "not in Latin script", "one word"

_ENDINGS = "jpe?g|png|gif|webp|tiff?|bmp|hei[cf]|svg|raw|cr2|nef|dng|psd|pdf|mp4|mov|avi"
_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)\p{L}*\.?"
# Captions that do not describe an image or need attention; the first kind that matches a whole caption counts.
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
    OTHER_SCRIPT: regex.compile(r"[^\p{Latin}]*"),
    ONE_WORD: regex.compile(r"[^ ]*"),
}


def token_count(caption: str) -> int:
    """CLIP tokens of a caption, start and end included, not truncated."""
    return len(Tokenizer(context=1 << 30).encode(caption))


def kind_of(caption: str) -> str | None:
    """Classify a caption: one of `KINDS`, or None for several words."""
    return next((name for name, pattern in KINDS.items() if pattern.fullmatch(caption)), None)
