"""Reading many pairs into hashes and numbers, and finding duplicates among them in nearly linear time."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import blake2b, sha256
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import regex
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from declip.data.pair import BrokenPair, Pair, PairSource, SkipCounter
from declip.data.text.tokenizer import Tokenizer, clean
from declip.io.pool import parallel_map

# steps to the right and down that a small copy has: hashes of 128 and of 512 bits
COARSE = 8
FINE = 16
# 83 bytes
LOOK = np.dtype("2u8, 8u8, 3u1")
LOOK.names = ("coarse", "fine", "tint")
STEP = 2  # gray levels by which a neighbor must be brighter to count, so that flat areas do not hash their noise
# Bits of 128 and of 512 in which the hashes of two near-duplicates may differ, and levels of 255 by which their mean
# red, green or blue may. Of the built-in photographs, drawings and icons, 90 % and more of the copies at half the size
# or of JPEG quality 75 pass (photographs: all).
COARSE_BITS = 6
FINE_BITS = 24
TINT = 16
# Blocks of 16 bits. Hashes that differ in 6 bits are equal in at least two of 8 blocks, so among hashes sorted by each
# pair of blocks, 28 in all, every pair of near-duplicates is adjacent at least once.
BLOCKS = 8
# Maximum distance of two hashes among those with the same two blocks, so that the work stays linear. If there are more
# (blank margins, one template) some near-duplicates are connected only through a third.
REACH = 64
SET_BITS = np.array([number.bit_count() for number in range(256)], np.uint8)

OTHER_SCRIPT = "not in Latin script"
FOREIGN = "not in English"
ONE_WORD = "one word"
# Short words of German, French, Spanish, Italian, Portuguese and Dutch that are neither words nor names in English: no
# "mit", "sur" or "las" (MIT, Big Sur, Las Vegas). None of the 134,356 captions of the built-in icons has one.
_FOREIGN = "ein|eine|einen|einem|einer|und|auf|der|das|dem|zwei|une|deux|avec|dans|les|una|con|por|gli|uma|een|het"
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
    "number or date": regex.compile(
        rf"[^\p{{L}}]*|(?:\d{{1,2}}\.? )?{_MONTH}(?: \d{{1,2}},?)? \d{{4}}", regex.I
    ),
    OTHER_SCRIPT: regex.compile(r"[^\p{Latin}]*"),
    FOREIGN: regex.compile(rf".*(?<!\p{{L}})(?:{_FOREIGN})(?!\p{{L}}).*", regex.I),
    ONE_WORD: regex.compile(r"[^ ]*"),
}

NO_KIND = -1

# What is kept of a pair, 109 bytes, and of a caption, 15 bytes; its kind by number, -1 for none.
PAIR = np.dtype(
    [
        ("index", np.int64),
        ("exact", np.uint64),
        ("look", LOOK),
        ("width", np.int32),
        ("height", np.int32),
        ("captions", np.uint16),
    ]
)
CAPTION = np.dtype(
    [
        ("hash", np.uint64),
        ("tokens", np.uint32),
        ("words", np.uint16),
        ("kind", np.int8),
    ]
)
MOST_PER_PAIR = np.iinfo(np.uint16).max  # captions of a pair that are looked at
# Parts that the work is divided into, and how many pairs one has: small ones move the bar, many cost memory.
PARTS = 200
SMALLEST_PART = 8
LARGEST_PART = 512


def image_hash(image: Image.Image) -> int:
    """64 bits of an RGB image's size and pixels: equal for equal images; a collision has probability 1 in 10^19."""
    # Half the time of others, where the processor has instructions for it
    digest = sha256(repr(image.size).encode())
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def caption_hash(caption: str) -> int:
    """64 bits of a caption as the tokenizer cleans it: captions that a model cannot distinguish have one hash."""
    text = clean(caption).encode()
    digest = blake2b(text, digest_size=8).digest()
    return int.from_bytes(digest, "little")


def look(image: Image.Image) -> np.ndarray:
    """Hash the appearance of an image: where it gets brighter, and its mean color.

    The hashes are dHash (Krawetz 2013) in both directions: one bit for each of 8 x 8, or 16 x 16, gray pixels of a
    small copy that says whether its right, or lower, neighbor is brighter. The coarse one is quick to search by.
    """
    small = _shrunk(image, COARSE + 1)
    larger = _shrunk(image, FINE + 1)
    tint = small.mean((0, 1)).round()
    return np.array((_brighter(small), _brighter(larger), tint), LOOK)


def _shrunk(image: Image.Image, side: int) -> np.ndarray:
    small = image.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(small, np.float32)


def _brighter(small: np.ndarray) -> np.ndarray:
    gray = small @ np.array([0.299, 0.587, 0.114], np.float32)
    here = gray[:-1, :-1]
    right = gray[:-1, 1:] - here > STEP
    down = gray[1:, :-1] - here > STEP
    bits = np.stack([right, down])
    return np.packbits(bits).view(np.uint64)


def equal_groups(hashes: np.ndarray) -> np.ndarray:
    """Number the groups of equal hashes (n,): int64 (n,), in the order of first members."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[group]


def components(count: int, edges: np.ndarray) -> np.ndarray:
    """Label the connected components of nodes 0 to `count` - 1 and edges (2, e): (count,)."""
    present = np.ones(edges.shape[1], bool)
    graph = coo_array((present, edges), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def near_groups(looks: np.ndarray) -> np.ndarray:
    """Number the groups of images that look alike, also through a third, by (n,) `LOOK`s: int64 (n,)."""
    raw = np.ascontiguousarray(looks).view(f"V{looks.itemsize}")
    _, distinct, equal = np.unique(raw, return_index=True, return_inverse=True)
    looks = looks[distinct]
    coarse = np.ascontiguousarray(looks["coarse"])
    fine = np.ascontiguousarray(looks["fine"])
    tints = looks["tint"].astype(np.int16)
    blocks = coarse.view(np.uint16).astype(np.uint32)
    labels = np.arange(len(looks))
    for first, second in combinations(range(BLOCKS), 2):
        # --- hashes that are equal in two blocks become neighbors
        key = blocks[:, first] << 16 | blocks[:, second]
        order = np.argsort(key, kind="stable")
        key = key[order]
        starts = np.arange(len(key) - 1)
        for shift in range(1, REACH + 1):
            starts = starts[starts + shift < len(key)]
            starts = starts[key[starts] == key[starts + shift]]
            if not len(starts):
                break
            # --- (2, candidates), without those that are joined already; then those that are near
            pair = np.stack([order[starts], order[starts + shift]])
            one, other = labels[pair]
            pair = pair[:, one != other]
            for hashes, most in ((coarse, COARSE_BITS), (fine, FINE_BITS)):
                one, other = hashes[pair]
                bits = SET_BITS[(one ^ other).view(np.uint8)]
                pair = pair[:, bits.sum(1, dtype=np.int64) <= most]
            one, other = tints[pair]
            furthest = np.abs(one - other).max(1, initial=0)
            pair = pair[:, furthest <= TINT]
            if pair.size:
                joined = components(len(looks), labels[pair])
                labels = joined[labels]
    return equal_groups(labels[equal])


def across(pairs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Find the pairs, (n,) with a field "look", whose image looks like one of `others`: bool (n,)."""
    looks = np.concatenate([pairs["look"], others["look"]])
    groups = near_groups(looks)
    return np.isin(groups[: len(pairs)], groups[len(pairs) :])


def repeated(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and sizes of the groups that have several members, the largest first."""
    sizes = np.bincount(groups)
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 1]
    return order, sizes[order]


def kind_of(caption: str) -> int:
    """Classify a caption: the number of the kind in `KINDS`; `NO_KIND` for several words."""
    for number, pattern in enumerate(KINDS.values()):
        if pattern.fullmatch(caption):
            return number
    return NO_KIND


class ReadPairs(NamedTuple):
    """What was read, in the order of the source."""

    pairs: np.ndarray  # (n,) `PAIR`, those that can be used
    captions: np.ndarray  # `CAPTION`, of all these pairs
    skipped: SkipCounter

    @classmethod
    def of(cls, rows: Iterable["PairRow"], skipped: SkipCounter) -> "ReadPairs":
        """Join the rows of pairs."""
        pairs = list[Any]()
        lines = list[Any]()
        for row in rows:
            pairs.append(row.pair)
            lines += row.captions
        return cls(np.array(pairs, PAIR), np.array(lines, CAPTION), skipped)


class PairRow(NamedTuple):
    """A pair as hashes and numbers: a row of `PAIR`, and one of `CAPTION` for each caption."""

    pair: tuple[object, ...]
    captions: Sequence[tuple[int, ...]]


RowOf = Callable[[Pair, int], PairRow]
"""A pair of a source and its index → its row; raises `BrokenPair`."""


def counted_row(pair: Pair, index: int) -> PairRow:
    """Hash the image and the captions of a pair, and count their pixels, words and tokens."""
    tokenizer = Tokenizer(context=1 << 30)  # CLIP's, without truncation
    lines = []
    for text in pair.captions()[:MOST_PER_PAIR]:
        tokens = len(tokenizer.encode(text))
        words = len(text.split())
        lines.append((caption_hash(text), tokens, words, kind_of(text)))
    image = pair.open().decoded()
    numbers = (index, image_hash(image), look(image), *image.size, len(lines))
    return PairRow(numbers, lines)


def compared_row(image: Image.Image, captions: Sequence[str], index: int) -> PairRow:
    """Hash what shows that two pairs are related: the look of an image and its captions, without counts."""
    lines = [(caption_hash(text), 0, 0, NO_KIND) for text in captions[:MOST_PER_PAIR]]
    numbers = (index, 0, look(image), *image.size, len(lines))
    return PairRow(numbers, lines)


def pair_row(pair: Pair, index: int) -> PairRow:
    """The `compared_row` of a pair."""
    captions = pair.captions()
    return compared_row(pair.open().decoded(), captions, index)


def image_row(pair: Pair, index: int) -> PairRow:
    """The `compared_row` of an image, whatever its captions are."""
    return compared_row(pair.open().decoded(), (), index)


def read(
    source: PairSource,
    indices: np.ndarray,
    row_of: RowOf,
    workers: int | None,
    progress: str = "",
) -> ReadPairs:
    """Read the pairs at rising indices by `workers` processes; `progress` is the title of a bar."""
    step = int(np.clip(len(indices) // PARTS, SMALLEST_PART, LARGEST_PART))
    parts = np.split(indices, range(step, len(indices), step))
    pairs = [np.empty(0, PAIR)]
    captions = [np.empty(0, CAPTION)]
    skipped = SkipCounter()
    read_part = partial(_read_part, source, row_of)
    for part in parallel_map(read_part, parts, workers, progress):
        pairs.append(part.pairs)
        captions.append(part.captions)
        skipped.merge(part.skipped)
    return ReadPairs(np.concatenate(pairs), np.concatenate(captions), skipped)


def _read_part(source: PairSource, row_of: RowOf, indices: np.ndarray) -> ReadPairs:
    rows = list[PairRow]()
    skipped = SkipCounter()
    for index in indices.tolist():
        try:
            rows.append(row_of(source[index], index))
        except BrokenPair as broken:
            skipped.add(broken)
    return ReadPairs.of(rows, skipped)
