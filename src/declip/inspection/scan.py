"""Inspect pairs before training on few of them; reports/templates/findings.txt has a macro for each rule."""

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from declip.data.columns import DEFAULT, Columns
from declip.data.images.thumbnails import shrink
from declip.data.pair import BrokenPair, PairSource
from declip.data.sources.open import ImageSource, open_source
from declip.data.sources.splits import splits_of
from declip.data.text.tokenizer import clean
from declip.errors import UserError, check_range
from declip.inspection import reading
from declip.inspection.reading import KINDS, ReadPairs, equal_groups
from declip.io.interval import wilson_interval
from declip.io.outputs import result_json
from declip.io.progress import status

BROKEN = 0.05  # default of `data.max_broken_fraction`: a run stops above it
# Fraction of a batch's rows with an equal caption in it: reported from the first on, to be fixed above the second.
EQUAL_ROWS = 0.01
MANY_EQUAL_ROWS = 0.1
# Multiples of the training size: from where on shrinking pays, and to what; pixels that towers' sizes divide by.
LARGE = 3.0
KEPT = 2
MULTIPLE = 32
SMALL = 0.25  # fraction of images under the training size from where on a smaller size pays
# of CLIP, and the fraction of captions that it may truncate
LONGEST_CONTEXT = 77
MANY_TRUNCATED = 0.01

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


@dataclass(frozen=True)
class Fraction:
    """A count out of a number, as a fraction, 0 of none."""

    count: int
    of: int
    low: float  # 95 % interval (Wilson 1927) for the complete source; the fraction itself if all of it was read
    high: float
    fraction: float

    @classmethod
    def counted(cls, count: int, of: int, whole: bool) -> "Fraction":
        """The fraction of a complete source or of a sample of it."""
        value = count / of if of else 0.0
        if whole or not of:
            return cls(count, of, value, value, value)
        low, high = wilson_interval(value, of)
        return cls(count, of, max(0.0, low), min(1.0, high), value)


Spread = dict[str, float]


def spread_of(values: np.ndarray) -> Spread:
    """Distribution of one number or more: n, mean, min, max and the percentiles p1, p5, p25, p50, p75, p95 and p99."""
    mean = float(values.mean(dtype=np.float64))
    spread = {"n": len(values), "mean": mean, "min": float(values.min())}
    for percent in (1, 5, 25, 50, 75, 95, 99):
        spread[f"p{percent}"] = float(np.percentile(values, percent))
    return {**spread, "max": float(values.max())}


@dataclass(frozen=True)
class ImageStats:
    """Statistics of the images, in pixels after EXIF rotation."""

    shorter: Spread
    aspect: Spread  # the longer side over the shorter
    size: int  # side of the training images
    smaller: Fraction  # images whose shorter side is smaller than that


@dataclass(frozen=True)
class CaptionStats:
    """Statistics of the captions; every caption of a pair counts."""

    per_pair: Spread
    words: Spread
    tokens: Spread  # CLIP's, start and end included, not truncated
    # Captions that a `text.context_length` would truncate, by context length
    truncated: dict[int, Fraction]
    # The shortest, a multiple of 8 or 77, that truncates at most 1 %; 77 where none does
    context_length: int
    kinds: dict[str, Fraction]  # see `reading.KINDS`
    examples: dict[str, list[str]]  # of each kind
    batch_size: int
    # Expected number of couples of equal captions in a batch: false negatives
    equal_in_batch: float


@dataclass(frozen=True)
class RepeatGroup:
    """Pairs with the same image or caption."""

    size: int
    keys: tuple[str, ...]  # of the first
    caption: str  # the first, or the one that all have


@dataclass(frozen=True)
class Repeats:
    """The pairs read that have an image or a caption in common with another, and the largest groups of them."""

    members: int
    groups: int
    examples: tuple[RepeatGroup, ...]


@dataclass(frozen=True)
class Leakage:
    """Pairs whose image looks like one of the `images` that another source has, with their keys and indices."""

    name: str
    images: int
    matches: Fraction
    copies: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Finding:
    """A number that matters for training: a rule, which is a macro of the template findings.txt, and what it says."""

    rule: str
    number: float
    values: dict[str, Any] = field(default_factory=dict)
    fix: bool = False  # whether it should be fixed before training


class Example(NamedTuple):
    """A pair to look at."""

    key: str
    caption: str  # the first
    width: int  # of the image in the source
    height: int
    image: Image.Image  # a small copy


@dataclass(frozen=True)
class Inspection:
    """Everything known about a source of pairs; made by `inspect_source`."""

    name: str
    total: int  # pairs of the source
    read: int  # pairs tried
    seed: int
    seconds: float
    broken: Fraction  # pairs tried that cannot be used
    reasons: dict[str, Any]  # each with its count and examples
    images: ImageStats | None = None  # this and all that follow are empty when no pair can be used
    captions: CaptionStats | None = None
    equal_images: Repeats | None = None
    near_images: Repeats | None = None  # that look alike, equal ones included
    equal_captions: Repeats | None = None
    leakages: tuple[Leakage, ...] = ()
    # Held-out images of a source with splits that look like a training image
    split_copies: Fraction | None = None
    findings: tuple[Finding, ...] = ()  # what is to be fixed first
    examples: tuple[Example, ...] = field(default=(), repr=False)
    near_examples: tuple[tuple[Example, ...], ...] = field(default=(), repr=False)
    credit: str = ""

    @property
    def whole(self) -> bool:
        """Whether every pair was tried."""
        return self.read == self.total

    @property
    def usable(self) -> int:
        """Pairs tried that can be used."""
        return self.read - self.broken.count

    def to_json(self) -> str:
        """All but the example images as JSON."""
        plain = asdict(replace(self, examples=(), near_examples=()))
        del plain["examples"], plain["near_examples"]
        return result_json({**plain, "whole": self.whole, "usable": self.usable})


class Findings(list[Finding]):
    """The findings so far."""

    def add(
        self, rule: str, number: float, least: float = 0.0, fix: float = inf, **values: Any
    ) -> None:
        """Apply a rule: it is reported from `least` on, and to be fixed above `fix`.

        Args:
            values: What its sentence needs beyond the numbers.
        """
        if number and number >= least:
            self.append(Finding(rule, number, values, number > fix))


def find(it: Inspection) -> tuple[Finding, ...]:
    """Apply all rules to an inspection without findings; what is to be fixed comes first."""
    found = Findings()
    if it.reasons:
        reason = max(it.reasons, key=lambda reason: it.reasons[reason]["count"])
        example = it.reasons[reason]["examples"][0]
        found.add("broken", it.broken.fraction, fix=BROKEN, reason=reason, example=example)
    for leak in it.leakages:
        found.add("leakage", leak.matches.fraction, fix=0, set=leak.name, images=leak.images)
    if it.split_copies is not None:
        found.add("split_copies", it.split_copies.fraction, fix=0)
    if it.images and it.captions and it.equal_images and it.near_images:
        equal = it.equal_images.members / it.usable
        near = it.near_images.members / it.usable
        found.add("equal_images", equal, fix=0.01)
        found.add("near_images", near if near > equal else 0, least=0.01)
        _check_captions(found, it.captions)
        _check_images(found, it.images)
    return tuple(sorted(found, key=lambda finding: not finding.fix))


def _check_captions(found: Findings, captions: CaptionStats) -> None:
    couples = captions.batch_size / 2  # of equal captions, if all rows of a batch had one
    some = couples * EQUAL_ROWS
    found.add("equal_captions", captions.equal_in_batch, some, couples * MANY_EQUAL_ROWS)
    odd = {kind: part.fraction for kind, part in captions.kinds.items()}
    one_word = odd.pop(reading.ONE_WORD, 0)
    other_script = odd.pop(reading.OTHER_SCRIPT, 0)
    foreign = odd.pop(reading.FOREIGN, 0)
    examples = captions.examples[max(odd, key=odd.__getitem__)] if odd else []
    example = ", ".join(examples)
    found.add("odd_captions", sum(odd.values()), 0.01, BROKEN, kinds=odd, example=example)
    found.add("one_word", one_word, least=0.2)
    found.add("other_script", other_script, least=0.05)
    found.add("foreign", foreign, least=0.1)
    truncated = captions.truncated[LONGEST_CONTEXT].fraction > MANY_TRUNCATED
    found.add("truncated" if truncated else "context_length", captions.context_length)


def _check_images(found: Findings, images: ImageStats) -> None:
    small = images.smaller.fraction
    smaller_side = max(MULTIPLE, int(images.shorter["p25"]) // MULTIPLE * MULTIPLE)
    found.add("small_images", small, least=SMALL, side=smaller_side)
    if small < SMALL:
        times = images.shorter["p50"] / images.size
        found.add("large_images", times, least=LARGE, side=KEPT * images.size)


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
    check_range("sample", 1 if sample is None else sample, 1)
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
    title = f"Pairs of {source.name}" if progress else ""
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
            facts = _described(drawn, size, batch_size, seed)
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
    return replace(inspection, findings=find(inspection), seconds=time.perf_counter() - start)


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
    title = f"Images of {other.name}" if progress else ""
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


def _described(sample: Sample, size: int, batch_size: int, seed: int) -> dict[str, Any]:
    """Fields of `Inspection` that need a pair that can be used."""
    source = sample.source
    pairs, lines, _ = sample.read
    n = len(pairs)
    indices = pairs["index"]
    counts = pairs["captions"].astype(np.int64)
    same = equal_groups(pairs["exact"])
    alike = reading.near_groups(pairs["look"])
    texts = equal_groups(lines["hash"])
    hashes = lines["hash"][np.unique(texts, return_index=True)[1]]  # of each text
    owners = np.repeat(np.arange(n), counts)  # (captions,), the pair of each
    # A text that a pair has twice counts once
    owners_of, shown = np.unique(np.stack([owners, texts]), axis=1)
    generator = np.random.default_rng((seed, n, 1))
    chosen = np.sort(generator.choice(n, min(EXAMPLES, n), replace=False))
    # Each pair shows one of its captions, as in an epoch; of all couples of pairs, how many show the same?
    own = (generator.random(n) * counts).astype(np.int64)
    sizes = np.bincount(texts[np.cumsum(counts) - counts + own])
    couples = (sizes * (sizes - 1)).sum()
    equal = float(couples / max(1, n * (n - 1)))
    shorter = np.minimum(pairs["width"], pairs["height"])
    longer = np.maximum(pairs["width"], pairs["height"])
    smaller = sample.fraction(shorter < size)
    near_examples = []
    for number in _most_different(same, alike):
        near_examples.append(_examples(source, indices[alike == number][:NEAR_MEMBERS]))
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
            for _, captions in _captioned(sample.source, indices[which][shown]):
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
        pairs = _captioned(source, indices[groups == number][:KEYS])
        captions = list(chain.from_iterable(own for _, own in pairs))
        if hashes is not None:
            wanted = hashes[number]
            captions = [clean(text) for text in captions if reading.caption_hash(text) == wanted]
        keys = tuple(key for key, _ in pairs)
        examples.append(RepeatGroup(size, keys, captions[0] if captions else ""))
    repeated = np.unique(indices[np.isin(groups, numbers)])
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


def _captioned(source: PairSource, indices: Iterable[int]) -> list[Captioned]:
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
