"""Reading many pairs into arrays of numbers, in several processes, with a progress bar."""

from functools import partial
from typing import NamedTuple

import numpy as np
import regex

from declip.data.pair import BrokenPair, Pair, PairSource, SkipCounter
from declip.data.text.tokenizer import Tokenizer
from declip.inspection.duplicates import LOOK, caption_hash, image_hash, look
from declip.io.pool import mapped

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
    "number or date": regex.compile(rf"[^\p{{L}}]*|(?:\d{{1,2}}\.? )?{_MONTH}(?: \d{{1,2}},?)? \d{{4}}", regex.I),
    OTHER_SCRIPT: regex.compile(r"[^\p{Latin}]*"),
    ONE_WORD: regex.compile(r"[^ ]*"),
}

# What is kept of a pair, 109 bytes.
PAIR = np.dtype(
    [
        ("place", np.int64),
        ("exact", np.uint64),
        ("look", LOOK),
        ("width", np.int32),
        ("height", np.int32),
        ("captions", np.uint16),
    ]
)

# What is kept of a caption, 15 bytes; its kind by number, -1 for none.
CAPTION = np.dtype([("hash", np.uint64), ("tokens", np.uint32), ("words", np.uint16), ("kind", np.int8)])

KIND_NUMBERS: dict[str | None, int] = {None: -1, **{name: number for number, name in enumerate(KINDS)}}
MOST_PER_PAIR = np.iinfo(np.uint16).max  # captions of a pair that are looked at

# Parts that the work is divided into, and how many pairs one has: small ones move the bar, many cost memory.
PARTS, SMALLEST_PART, LARGEST_PART = 200, 8, 512


def token_count(caption: str) -> int:
    """CLIP tokens of a caption, start and end included, not truncated."""
    return len(Tokenizer(context=1 << 30).encode(caption))


def kind_of(caption: str) -> str | None:
    """Classify a caption: one of `KINDS`, or None for several words."""
    return next((name for name, pattern in KINDS.items() if pattern.fullmatch(caption)), None)


class ReadPairs(NamedTuple):
    """The `PAIR`s that can be used, in the order of the source, and their `CAPTION`s."""

    pairs: np.ndarray
    captions: np.ndarray
    skipped: SkipCounter


def read(
    source: PairSource, places: np.ndarray, workers: int | None, progress: str = "", captioned: bool = True
) -> ReadPairs:
    """Read the pairs at rising places with workers as `mapped` has them; `progress` is the title of a bar.

    Not `captioned`: the images alone, whatever their captions are.
    """
    step = int(np.clip(len(places) // PARTS, SMALLEST_PART, LARGEST_PART))
    parts = [places[start : start + step] for start in range(0, len(places), step)]
    pairs, captions, skipped = [np.empty(0, PAIR)], [np.empty(0, CAPTION)], SkipCounter()
    for part in mapped(partial(_read_part, source, captioned), parts, workers, progress):
        pairs.append(part.pairs)
        captions.append(part.captions)
        skipped.merge(part.skipped)
    return ReadPairs(np.concatenate(pairs), np.concatenate(captions), skipped)


def _read_part(source: PairSource, captioned: bool, places: np.ndarray) -> ReadPairs:
    rows: list[tuple[object, ...]] = []
    lines: list[tuple[int, ...]] = []
    skipped = SkipCounter()
    for place in places.tolist():
        try:
            pair = source[place] if captioned else Pair("", source.image(place), ())
        except BrokenPair as broken:
            skipped.add(broken)
            continue
        captions = pair.captions[:MOST_PER_PAIR]
        for caption in captions:
            kind = KIND_NUMBERS[kind_of(caption)]
            lines.append((caption_hash(caption), token_count(caption), len(caption.split()), kind))
        rows.append((place, image_hash(pair.image), look(pair.image), *pair.image.size, len(captions)))
    return ReadPairs(np.array(rows, PAIR), np.array(lines, CAPTION), skipped)
