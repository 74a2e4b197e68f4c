"""Inspect pairs before training on few of them."""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from declip.data.columns import DEFAULT, Columns
from declip.data.images.thumbnails import shrink
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.open import ImageSource, open_source
from declip.data.sources.splits import splits_of
from declip.data.text.tokenizer import clean
from declip.errors import UserError, check_range
from declip.inspection import reading
from declip.inspection.reading import KINDS, ReadPairs, equal_groups
from declip.inspection.results import (
    CaptionStats,
    Example,
    Fraction,
    ImageStats,
    Inspection,
    Leakage,
    RepeatGroup,
    Repeats,
    spread_of,
)
from declip.inspection.rules import find
from declip.io.progress import status

SAMPLE = 2000
SIZE = 224
BATCH = 128
SEED = 0
# example pairs; groups that look alike, and members of each
EXAMPLES = 40
NEAR_EXAMPLES = 4
NEAR_MEMBERS = 8
OF_A_KIND = 3  # captions of each kind
LONGEST_TEXT = 120  # characters of each
LISTED = 10  # groups
KEYS = 5  # of each
THUMBNAIL = 224  # pixels of an example's longer side, at most: sharp at half of that on a screen of double density
CONTEXTS = (*range(16, 77, 8), 77)
SHOWN_LENGTHS = (32, 77)
LEFT_OUT = 0.01  # fraction of the captions that the advised context may cut


def inspect_source(
    source: str | Path | PairSource,
    sample: int | None = SAMPLE,
    *,
    seed: int = SEED,
    workers: int | None = None,
    size: int = SIZE,
    batch_size: int = BATCH,
    check_leakage: Sequence[str | Path | PairSource] = (),
    columns: Columns = DEFAULT,
    progress: bool = False,
) -> Inspection:
    """Inspect a source of pairs before training on it.

    Args:
        sample: How many random pairs to read; None reads them all, 109 bytes a pair and 15 a caption.
        workers: Processes that read; 0 reads in this process, None uses one per core, at most 8.
        size: Side of the training images, pixels, that resolutions are compared with.
        batch_size: Pairs of a training batch, that equal captions are counted for.
        check_leakage: Sources whose images should not be among the pairs, such as a test set; all are read.
        columns: For tables, see `open_source`.
    """
    # --- the sources
    if sample is not None:
        check_range("sample", sample, 1)
    check_range("seed", seed, 0)
    check_range("workers", workers or 0, 0)
    check_range("size", size, 1)
    check_range("batch_size", batch_size, 2)
    start = time.perf_counter()
    source = open_source(source, columns)
    others = [open_source(other, Columns(caption=None)) for other in check_leakage]
    # --- the sample, some of it broken
    total = len(source)
    indices = np.arange(total)
    if sample is not None and sample < total:
        generator = np.random.default_rng((seed, total))
        indices = np.sort(generator.choice(total, sample, replace=False))
    whole = len(indices) == total
    title = ""
    if progress:
        title = f"Pairs of {source.name}"
    read = reading.read(source, indices, reading.counted_row, workers, title)
    drawn = Sample(source, read, whole)
    # --- statistics of the usable pairs, leakage, and what follows
    broken = Fraction.counted(read.skipped.total, len(indices), whole)
    reasons: dict[str, Any] = read.skipped.to_dict()["reasons"]
    for reason, detail in read.skipped.details.items():
        if detail:  # such as the path that was tried
            reasons[reason]["examples"][0] += f" ({detail})"
    facts: dict[str, Any] = {}
    if len(read.pairs):
        with status("Looking for duplicates", progress):
            facts = _describe(drawn, size, batch_size, seed)
        leakages = [_leakage(drawn, other, workers, progress) for other in others]
        facts["leakages"] = tuple(leakages)
    inspection = Inspection(
        name=source.name,
        total=total,
        read=len(indices),
        seed=seed,
        seconds=0.0,
        broken=broken,
        reasons=reasons,
        credit=source.credit,
        **facts,
    )
    findings = find(inspection)
    seconds = time.perf_counter() - start
    return replace(inspection, findings=findings, seconds=seconds)


class Sample(NamedTuple):
    """The pairs of a source that were read, all or some."""

    source: PairSource
    read: ReadPairs
    whole: bool

    def fraction(self, which: np.ndarray) -> Fraction:
        """The fraction of pairs or captions (n,) bool that are true."""
        return Fraction.counted(int(which.sum()), len(which), self.whole)


def _leakage(sample: Sample, other: PairSource, workers: int | None, progress: bool) -> Leakage:
    """Find the pairs whose image looks like one of another source."""
    title = ""
    if progress:
        title = f"Images of {other.name}"
    indices = np.arange(len(other))
    seen, _, skipped = reading.read(other, indices, reading.image_row, workers, title)
    if not len(seen):
        raise UserError(f"No image of '{other.name}' can be used. {skipped.explanation()}")
    pairs = sample.read.pairs
    copied = reading.across(pairs, seen)
    images = ImageSource(sample.source)
    copied_indices = pairs["index"][copied].tolist()
    copies = tuple((images[index].key, index) for index in copied_indices)
    return Leakage(other.name, len(seen), sample.fraction(copied), copies)


def _describe(sample: Sample, size: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Fields of `Inspection` that need a pair that can be used."""
    source = sample.source
    pairs, lines, _ = sample.read
    n = len(pairs)
    indices = pairs["index"]
    counts = pairs["captions"].astype(np.int64)
    same = equal_groups(pairs["exact"])
    alike = reading.near_groups(pairs["look"])
    texts = equal_groups(lines["hash"])
    _, first = np.unique(texts, return_index=True)
    hashes = lines["hash"][first]  # of each text
    owners = np.repeat(np.arange(n), counts)  # (captions,), the pair of each
    # A text that a pair has twice counts once
    both = np.stack([owners, texts])
    owners_of, shown = np.unique(both, axis=1)
    generator = np.random.default_rng((seed, n, 1))
    chosen = np.sort(generator.choice(n, min(EXAMPLES, n), replace=False))
    # Each pair shows one of its captions, as in an epoch; of all couples of pairs, how many show the same?
    own = (generator.random(n) * counts).astype(np.int64)
    starts = np.cumsum(counts) - counts
    sizes = np.bincount(texts[starts + own])
    couples = (sizes * (sizes - 1)).sum()
    equal = float(couples / max(1, n * (n - 1)))
    shorter = np.minimum(pairs["width"], pairs["height"])
    longer = np.maximum(pairs["width"], pairs["height"])
    smaller = sample.fraction(shorter < size)
    near_examples = []
    for number in _most_different(same, alike):
        members = indices[alike == number]
        near_examples.append(_examples(source, members[:NEAR_MEMBERS]))
    return {
        "images": ImageStats(spread_of(shorter), spread_of(longer / shorter), size, smaller),
        "captions": _captions(sample, indices[owners], equal, batch_size),
        "equal_images": _repeats(source, same, indices),
        "near_images": _repeats(source, alike, indices),
        "split_copies": _split_copies(sample, alike),
        "equal_captions": _repeats(source, shown, indices[owners_of], hashes),
        "examples": _examples(source, indices[chosen]),
        "near_examples": tuple(near_examples),
    }


def _split_copies(sample: Sample, alike: np.ndarray) -> Fraction | None:
    """Count the pairs of other splits whose image is one of those that are `alike` (n,) to a training image."""
    splits = splits_of(sample.source)
    indices = sample.read.pairs["index"]
    train = np.isin(indices, splits.pop("train", []))
    held_out = np.isin(indices, [*chain.from_iterable(splits.values())])
    if not held_out.any():
        return None
    copied = np.isin(alike[held_out], alike[train])
    return sample.fraction(copied)


def _captions(sample: Sample, indices: np.ndarray, equal: float, batch_size: int) -> CaptionStats:
    """Statistics of the captions, of the pairs at `indices`; `equal` is how likely two pairs show one text."""
    pairs, lines, _ = sample.read
    tokens = lines["tokens"]
    for context_length in CONTEXTS:
        if (tokens > context_length).mean() <= LEFT_OUT:
            break
    kinds = {}
    examples = {}
    for kind, name in enumerate(KINDS):
        which = lines["kind"] == kind
        if which.any():
            kinds[name] = sample.fraction(which)
            _, first = np.unique(lines["hash"][which], return_index=True)  # of each text
            shown = np.sort(first)[:OF_A_KIND]
            texts = list[str]()
            for _, captions in _with_captions(sample.source, indices[which][shown]):
                texts += [text for text in captions if reading.kind_of(text) == kind]
            distinct = dict.fromkeys(text[:LONGEST_TEXT] for text in texts)
            examples[name] = list(distinct)[:OF_A_KIND]
    batch_size = min(batch_size, len(sample.source))
    frequent = sorted(kinds.items(), key=lambda item: -item[1].count)
    truncated = {}
    for length in sorted({*SHOWN_LENGTHS, context_length}):
        truncated[length] = sample.fraction(tokens > length)
    return CaptionStats(
        per_pair=spread_of(pairs["captions"]),
        words=spread_of(lines["words"]),
        tokens=spread_of(tokens),
        truncated=truncated,
        context_length=context_length,
        kinds=dict(frequent),
        examples=examples,
        batch_size=batch_size,
        equal_in_batch=equal * batch_size * (batch_size - 1) / 2,
    )


def _repeats(
    source: PairSource, groups: np.ndarray, indices: np.ndarray, hashes: np.ndarray | None = None
) -> Repeats:
    """Group repeated images, or captions with a hash for each group, by the group and index (n,) of each pair."""
    numbers, sizes = reading.repeated(groups)
    examples = []
    for number, size in zip(numbers[:LISTED], sizes.tolist(), strict=False):
        members = indices[groups == number]
        pairs = _with_captions(source, members[:KEYS])
        captions = list(chain.from_iterable(own for _, own in pairs))
        if hashes is not None:
            wanted = hashes[number]
            captions = [clean(text) for text in captions if reading.caption_hash(text) == wanted]
        keys = tuple(key for key, _ in pairs)
        caption = ""
        if captions:
            caption = captions[0]
        examples.append(RepeatGroup(size, keys, caption))
    is_repeated = np.isin(groups, numbers)
    repeated = np.unique(indices[is_repeated])
    return Repeats(len(repeated), len(numbers), tuple(examples))


def _most_different(same: np.ndarray, alike: np.ndarray) -> list[int]:
    """Numbers of groups of near-duplicates, those with most images that are not equal first."""
    numbers, sizes = reading.repeated(alike)
    _, distinct = np.unique(same, return_index=True)
    different = np.bincount(alike[distinct], minlength=alike.max() + 1)
    order = np.lexsort((-sizes, -different[numbers]))
    return numbers[order[:NEAR_EXAMPLES]].tolist()


# Only numbers of the pairs were kept, so these are read again, without those that were removed in the meantime.
Captioned = tuple[str, tuple[str, ...]]


def _with_captions(source: PairSource, indices: Iterable[int]) -> list[Captioned]:
    """Keys and captions of pairs."""
    captioned = []
    for index in indices:
        with suppress(BrokenPair):
            pair = source[int(index)]
            captioned.append((pair.key, pair.captions()))
    return captioned


def _examples(source: PairSource, indices: Iterable[int]) -> tuple[Example, ...]:
    """Pairs with small copies of their images."""
    examples = []
    for index in indices:
        with suppress(BrokenPair):
            pair = source[int(index)]
            caption = pair.captions()[0]
            image = pair.open().decoded()
            examples.append(Example(pair.key, caption, *image.size, shrink(image, THUMBNAIL)))
    return tuple(examples)
