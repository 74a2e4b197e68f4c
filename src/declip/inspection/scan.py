"""Inspect a source of pairs: read a sample and compute its statistics, duplicates and leakage."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from declip.data.pair import BrokenPair, Pair, PairSource
from declip.data.sources.image_source import ImageSource
from declip.data.sources.open import open_source
from declip.data.text.tokenizer import clean
from declip.errors import check_range
from declip.inspection.duplicates import across, coincidence, equal_groups, near_groups, repeated
from declip.inspection.findings import find
from declip.inspection.fingerprint import caption_hash
from declip.inspection.reading import ReadPairs, read
from declip.inspection.result import (
    CaptionStats,
    Example,
    Fraction,
    Histogram,
    ImageStats,
    Inspection,
    Leakage,
    RepeatGroup,
    Repeats,
    Spread,
)
from declip.io.pool import usual_workers
from declip.io.progress import status

SAMPLE, SIZE, BATCH, SEED = 2000, 224, 128, 0
STRETCHES = 16
"""Parts of the source that a sample is spread over, so that it holds the beginning and the end."""

EXAMPLES, NEAR_EXAMPLES, NEAR_MEMBERS = 40, 4, 8
"""Example pairs; groups of images that look alike, and members of each."""

LISTED, KEYS = 10, 5
"""Groups, captions and words that are listed, and keys of each group."""

THUMBNAIL = 224
"""Pixels of an example's longer side, at most: sharp at half of that on a screen of double density."""

SIDES = (1, 32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
TOKENS = (1, 9, 17, 25, 33, 41, 49, 57, 65, 78)
CONTEXTS = (*range(16, 77, 8), 77)
SHOWN_LENGTHS = (32, 77)
LEFT_OUT = 0.01
"""Fraction of the captions that the advised context may cut."""


def inspect_source(
    source: str | Path | PairSource,
    sample: int | None = SAMPLE,
    *,
    seed: int = SEED,
    workers: int | None = None,
    size: int = SIZE,
    batch_size: int = BATCH,
    check_leakage: Sequence[str | Path | PairSource] = (),
    image_column: str = "image",
    caption_column: str = "caption",
    image_root: str | Path | None = None,
    progress: bool = False,
) -> Inspection:
    """Inspect a source of pairs before training on it.

    Reading all of a large source takes memory for numbers only: 116 bytes a pair and 16 a caption are kept, and about
    250 more a pair while duplicates are looked for.

    Args:
        source: A source, or what `open_source` opens.
        sample: How many pairs to read, spread over the source's length; None reads them all.
        seed: Chooses the sample and the examples.
        workers: Processes that read; 0 reads in this one, None takes one for each core, 8 at most.
        size: Side of the training images, pixels, that resolutions are compared with.
        batch_size: Pairs of a training batch, that equal captions are counted for.
        check_leakage: Sources whose images should not be among the pairs, such as a test set; they are read whole.
        image_column, caption_column, image_root: For tables, see `open_source`.
    """
    if sample is not None:
        check_range("sample", sample, 1)
    check_range("seed", seed, 0)
    workers = usual_workers() if workers is None else workers
    check_range("workers", workers, 0)
    check_range("size", size, 1)
    check_range("batch_size", batch_size, 2)
    start = time.perf_counter()
    opened = _opened(source, image_column=image_column, caption_column=caption_column, image_root=image_root)
    others = [_opened(other) for other in check_leakage]
    places = sample_places(len(opened), sample, seed)
    found = read(opened, places, workers, f"Pairs of {opened.name}" if progress else "")
    whole = len(places) == len(opened)
    inspection = Inspection(
        name=opened.name,
        total=len(opened),
        read=len(places),
        seed=seed,
        seconds=0.0,
        broken=Fraction.counted(len(places) - len(found.pairs), len(places), whole),
        reasons=_named(found),
        credit=getattr(opened, "credit", ""),
    )
    if len(found.pairs):
        with status("Looking for duplicates", bool(progress)):
            inspection = _described(inspection, opened, found, size, batch_size)
        seen = found.pairs
        leakages = [_leakage(opened, seen, other, workers, whole, progress) for other in others]
        inspection = replace(inspection, leakages=tuple(leakages))
    inspection = replace(inspection, findings=find(inspection))
    return replace(inspection, seconds=time.perf_counter() - start)


def sample_places(total: int, sample: int | None, seed: int) -> np.ndarray:
    """Sample places evenly over a source's length, all where that is not more than `sample`.

    Returns:
        Rising, int64: at random within each of 16 stretches of the source, not on a grid, so that neighbors in the
        file, often alike, are sampled together as often as any two.
    """
    if sample is None or sample >= total:
        return np.arange(total)
    generator = np.random.default_rng((seed, total))
    stretches = 1 if 2 * sample > total else min(STRETCHES, sample)
    ends, counts = (np.arange(stretches + 1) * n // stretches for n in (total, sample))
    sampled = [
        low + generator.choice(high - low, count, replace=False)
        for low, high, count in zip(ends, ends[1:], np.diff(counts), strict=False)
    ]
    return np.sort(np.concatenate(sampled)).astype(np.int64)


def _named(found: ReadPairs) -> dict[str, Any]:
    """Reasons with their counts and examples; the first example says more than its key, such as the path tried."""
    reasons: dict[str, Any] = found.skipped.to_dict()["reasons"]
    for reason, detail in found.details.items():
        first, *others = reasons[reason]["examples"]
        reasons[reason]["examples"] = [f"{first} ({detail})", *others]
    return reasons


def _opened(source: str | Path | PairSource, **columns: str | Path | None) -> PairSource:
    return open_source(source, **columns) if isinstance(source, str | Path) else source  # type: ignore[arg-type]


def _described(inspection: Inspection, source: PairSource, found: ReadPairs, size: int, batch_size: int) -> Inspection:
    """Add all that needs a pair that can be used."""
    pairs, lines, whole = found.pairs, found.captions, inspection.whole
    texts = _texts(pairs, lines)
    same, alike = equal_groups(pairs["exact"]), near_groups(pairs["look"])
    generator = np.random.default_rng((inspection.seed, len(pairs), 1))
    shown = np.sort(generator.choice(len(pairs), min(EXAMPLES, len(pairs)), replace=False))
    scale = _scale(inspection)
    return replace(
        inspection,
        images=_images(source, found, size, whole),
        captions=_captions(source, found, texts, batch_size, whole),
        keywords=Fraction.counted(int(np.count_nonzero(pairs["keywords"])), len(pairs), whole),
        keywords_per_pair=float(pairs["keywords"].mean()),
        equal_images=_repeats(source, same, pairs["place"], np.arange(len(pairs)), scale),
        near_images=_repeats(source, alike, pairs["place"], np.arange(len(pairs)), scale),
        equal_captions=_repeats(source, texts.group, pairs["place"], texts.owner, scale),
        examples=tuple(filter(None, (_example(source, int(pairs["place"][at])) for at in shown))),
        near_examples=_near_examples(source, pairs["place"], same, alike),
    )


@dataclass(frozen=True)
class _Texts:
    """The different texts of each pair: (k,) the pair's number, the group of equal texts, how likely the pair is to
    show it, and its line among all captions."""

    owner: np.ndarray
    group: np.ndarray
    weight: np.ndarray
    line: np.ndarray


def _texts(pairs: np.ndarray, lines: np.ndarray) -> _Texts:
    owners = np.repeat(np.arange(len(pairs)), pairs["captions"])
    groups = equal_groups(lines["hash"])
    count = int(groups.max()) + 1
    codes, first, inverse = np.unique(owners * count + groups, return_index=True, return_inverse=True)
    weights = np.bincount(inverse, 1.0 / pairs["captions"][owners])
    return _Texts(codes // count, codes % count, weights, first)


def _scale(inspection: Inspection) -> float:
    """Pairs of pairs in the source for each pair of pairs in the sample, broken ones taken to be equally many."""
    if inspection.whole or inspection.usable < 2:
        return 1.0
    return inspection.total * (inspection.total - 1) / (inspection.read * (inspection.read - 1))


def _images(source: PairSource, found: ReadPairs, size: int, whole: bool) -> ImageStats:
    pairs = found.pairs
    width, height = pairs["width"], pairs["height"]
    shorter, longer = np.minimum(width, height), np.maximum(width, height)
    weights = pairs["bytes"][pairs["bytes"] > 0]
    n = len(pairs)
    return ImageStats(
        width=Spread.of(width),
        height=Spread.of(height),
        shorter=Spread.of(shorter),
        aspect=Spread.of(longer / shorter),
        histogram=Histogram.of(shorter, SIDES),
        size=size,
        smaller=Fraction.counted(int((shorter < size).sum()), n, whole),
        long=Fraction.counted(int((longer > 3 * shorter.astype(np.int64)).sum()), n, whole),
        blank=Fraction.counted(int(pairs["blank"].sum()), n, whole),
        blank_keys=_keys(source, pairs["place"][pairs["blank"]]),
        formats=dict(found.formats.most_common()),
        modes=dict(found.modes.most_common()),
        bytes=Spread.of(weights) if len(weights) else None,
    )


def _captions(source: PairSource, found: ReadPairs, texts: _Texts, batch_size: int, whole: bool) -> CaptionStats:
    pairs, lines, counts = found.pairs, found.captions, found.counts
    tokens, n = lines["tokens"], len(lines)
    context_length = next((each for each in CONTEXTS if (tokens > each).mean() <= LEFT_OUT), CONTEXTS[-1])
    equal = coincidence(texts.group, texts.weight, len(pairs))
    return CaptionStats(
        per_pair=Spread.of(pairs["captions"]),
        words=Spread.of(lines["words"]),
        characters=Spread.of(lines["characters"]),
        tokens=Spread.of(tokens),
        histogram=Histogram.of(tokens, TOKENS),
        truncated={
            length: Fraction.counted(int((tokens > length).sum()), n, whole)
            for length in sorted({*SHOWN_LENGTHS, context_length})
        },
        context_length=context_length,
        kinds={kind: Fraction.counted(count, n, whole) for kind, count in counts.kinds.most_common()},
        examples=counts.examples,
        scripts=dict(counts.scripts.most_common()),
        frequent=_frequent(source, found, texts),
        common_words=tuple(counts.words.most_common(LISTED)),
        batch_size=batch_size,
        equal_in_batch=equal * batch_size * (batch_size - 1) / 2,
    )


def _frequent(source: PairSource, found: ReadPairs, texts: _Texts) -> tuple[tuple[str, int], ...]:
    """The commonest captions that several pairs have, read again from the first pair that has each."""
    commonest = []
    for group, size in zip(*(each[:LISTED].tolist() for each in repeated(texts.group)), strict=True):
        first = int(np.argmax(texts.group == group))
        captions = source.captions(int(found.pairs["place"][texts.owner[first]]))
        hashed = found.captions["hash"][texts.line[first]]
        text = next((caption for caption in captions if caption_hash(caption) == hashed), captions[0])
        commonest.append((clean(text), size))
    return tuple(commonest)


def _repeats(source: PairSource, groups: np.ndarray, places: np.ndarray, owners: np.ndarray, scale: float) -> Repeats:
    """What comes more than once; `owners` are the pairs that show each of `groups`, places in `places`."""
    numbers, sizes = repeated(groups)
    member = np.bincount(groups)[groups] > 1
    together = int((sizes.astype(np.int64) * (sizes - 1) // 2).sum())
    return Repeats(
        members=len(np.unique(owners[member])),
        groups=len(numbers),
        surplus=int(sizes.sum()) - len(numbers),
        coincidences=together,
        expected=together * scale,
        examples=tuple(
            _group(source, places[owners[groups == number]], int(size))
            for number, size in zip(numbers[:LISTED], sizes[:LISTED], strict=True)
        ),
    )


def _group(source: PairSource, places: np.ndarray, size: int) -> RepeatGroup:
    pairs = [pair for place in places[:KEYS] if (pair := _pair(source, int(place)))]
    return RepeatGroup(size, tuple(pair.key for pair in pairs), pairs[0].captions[0] if pairs else "")


def _near_examples(
    source: PairSource, places: np.ndarray, same: np.ndarray, alike: np.ndarray
) -> tuple[tuple[Example, ...], ...]:
    """Groups of images that look alike: those that say most, of images that are not equal, first."""
    numbers, sizes = repeated(alike)
    if not len(numbers):
        return ()
    kinds = np.zeros(alike.max() + 1, np.int64)
    np.add.at(kinds, alike[np.unique(same, return_index=True)[1]], 1)
    order = np.lexsort((-sizes, -kinds[numbers]))[:NEAR_EXAMPLES]
    rows = (places[alike == number][:NEAR_MEMBERS] for number in numbers[order])
    return tuple(tuple(filter(None, (_example(source, int(place)) for place in row))) for row in rows)


def _example(source: PairSource, place: int) -> Example | None:
    pair = _pair(source, place)
    if pair is None:
        return None
    small = pair.image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return Example(pair.key, pair.captions[0], *pair.image.size, small)


def _keys(source: PairSource, places: np.ndarray) -> tuple[str, ...]:
    """Keys of the first few."""
    return tuple(pair.key for place in places[:KEYS] if (pair := _pair(source, int(place))))


def _pair(source: PairSource, place: int) -> Pair | None:
    """A pair that could be read before; None where it was removed meanwhile."""
    try:
        return source[place]
    except BrokenPair:
        return None


def _leakage(
    source: PairSource, pairs: np.ndarray, other: PairSource, workers: int, whole: bool, progress: bool
) -> Leakage:
    seen = read(other, np.arange(len(other)), workers, f"Images of {other.name}" if progress else "").pairs
    found, images = across(pairs, seen), ImageSource(source)
    copies = tuple((images.key(int(place)), int(place)) for place in pairs["place"][found])
    return Leakage(other.name, len(seen), Fraction.counted(len(copies), len(pairs), whole), copies)
