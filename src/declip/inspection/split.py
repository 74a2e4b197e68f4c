"""Splitting pairs into a training and a validation part that share no image and no caption."""

import hashlib
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from declip.data.pair import PairSource
from declip.data.sources.splits import splits_of, training_part
from declip.data.sources.subset import Subset, groups_of
from declip.errors import UserError
from declip.inspection.reading import (
    ReadPairs,
    across,
    components,
    equal_groups,
    image_row,
    near_groups,
    pair_row,
    read,
)
from declip.io.text import percent, plural

# Fraction of the pairs that the validation part has, and at most how many; pairs of which a part can be split off.
FRACTION = 0.1
MOST = 5_000
FEWEST = 20
COPIED = 0.5  # fraction of copied validation images above which a validation set is refused
SEEN = (
    "The weights were trained on these pairs, or on most of them ('{}'), so the validation results are too high. Give "
    "other pairs with --val."
)

log = logging.getLogger("declip")


class PairSplit(NamedTuple):
    """Indices of the two parts in the source, rising; pairs that cannot be read are in the training part."""

    train: np.ndarray
    val: np.ndarray


def split_pairs(
    source: PairSource, most: int = MOST, progress: bool = False, seen: PairSource | None = None
) -> PairSplit:
    """Split off a validation part: pairs with nearly the same image, the same caption, or one group stay together.

    A source with a split "validation" keeps its own parts; one with other splits is split within its training pairs.
    Else sets of such pairs whose hash, the largest of a pair, is below `FRACTION` are the validation part, so that no
    training pair is ever validated on when pairs are added. Of few pairs, between half and twice the wanted number are
    chosen. Sets with an image of `seen`, pairs that were trained on before, go to training, if enough others are left.
    """
    splits = splits_of(source)
    candidates = training_part(source)
    if "validation" in splits:
        val = splits["validation"]
        held_out = Subset(source, val, f"the validation split of {source.name}")
        training_sets = [candidates]
        if seen is not None:
            training_sets.append(seen)
        for trained in training_sets:
            try:
                check_copies(trained, [held_out], progress)
            except UserError:
                if trained is not seen:
                    raise
                log.warning(SEEN.format(seen.name))
        return PairSplit(splits["train"], val)
    pairs = _read(candidates, progress)
    named = groups_of(candidates)[pairs.pairs["index"]]  # (n,) int64, as all below
    related = _relate(pairs, named)
    sizes = np.bincount(related)
    hashes = _hashes(pairs, named, related)
    # --- the sets with the lowest hashes; what the start was trained on is not held out, unless it is nearly all
    chosen = _chosen(hashes, sizes, most)
    if seen is not None:
        known = read(seen, np.arange(len(seen)), image_row, None)
        copied = across(pairs.pairs, known.pairs)
        fresh = hashes.copy()
        fresh[np.unique(related[copied])] = np.inf
        new = _chosen(fresh, sizes, most)
        if new:
            chosen = new
        elif chosen:
            log.warning(SEEN.format(seen.name))
    val = pairs.pairs["index"][np.isin(related, chosen)]
    if not len(val):
        raise UserError(
            f"No validation part can be split off '{source.name}': its {len(related):,} pairs make "
            f"{len(sizes):,} groups with the same captions or images, the largest of {sizes.max():,} pairs. "
            "Write captions that differ, or pass a validation set with --val."
        )
    train = np.setdiff1d(np.arange(len(candidates)), val)
    indices = splits.get("train", np.arange(len(source)))  # of the candidates in the source
    return PairSplit(indices[train], indices[val])


def _hashes(pairs: ReadPairs, named: np.ndarray, related: np.ndarray) -> np.ndarray:
    """A number from 0 to 1 for each set of related pairs: the largest of its pairs, of their group or first caption.

    A set that gains a pair can only leave the validation part, wherever the pair stands in the source.
    """
    # (n,) row of each pair's first caption
    counts = pairs.pairs["captions"]
    captions = pairs.captions["hash"][np.cumsum(counts) - counts]
    hashes = []
    keys = np.where(named != 0, named.view(np.uint64), captions)
    for key in keys.tolist():
        digest = hashlib.blake2b(key.to_bytes(8, "little"), digest_size=8, person=b"split")
        hashes.append(int.from_bytes(digest.digest()) / 2**64)
    largest = np.zeros(related.max() + 1)
    np.maximum.at(largest, related, hashes)
    return largest


def _chosen(hashes: np.ndarray, sizes: np.ndarray, most: int) -> list[int]:
    """Numbers of the sets of the validation part; none where the sets are too large."""
    total = int(sizes.sum())
    target = max(1, min(round(FRACTION * total), most))
    # Not target / total, which varies with each pair that is added
    below = min(FRACTION, most / total)
    chosen = []
    count = 0
    for number in np.argsort(hashes, kind="stable").tolist():
        wanted = hashes[number] < below
        if not wanted and (2 * count >= target or hashes[number] == np.inf):
            break
        limit = target
        if wanted:
            limit = 2 * target
        if count + sizes[number] <= limit:
            chosen.append(number)
            count += int(sizes[number])
    if 2 * count < target:
        return []
    return chosen


def check_copies(train: PairSource, held_out: Sequence[PairSource], progress: bool = False) -> None:
    """Look for the images of validation sets among the training images: warn of some, raise an error from half on."""
    pairs = _read(train, progress, fewest=1).pairs
    for val in held_out:
        seen = _read(val, progress, fewest=1).pairs
        copies = float(across(seen, pairs).mean())
        words = f"{percent(copies)} of the images of '{val.name}' are training images too, or nearly the same"
        if copies >= COPIED:
            raise UserError(
                f"{words}, so it measures memorization. Give other pairs with --val, or correct the split."
            )
        if copies:
            log.warning(f"{words}: its numbers are inflated by leakage.")


def related_pairs(pairs: ReadPairs, source: PairSource) -> np.ndarray:
    """The group of each pair that must not be separated from it, by its least hash of a caption: int64 (n,)."""
    check_pairs(pairs, source.name, len(source))
    named = groups_of(source)[pairs.pairs["index"]]
    related = _relate(pairs, named)
    least = np.full(related.max() + 1, np.iinfo(np.uint64).max)
    groups = np.repeat(related, pairs.pairs["captions"])
    np.minimum.at(least, groups, pairs.captions["hash"])
    return least.view(np.int64)[related]


def _relate(pairs: ReadPairs, named: np.ndarray) -> np.ndarray:
    """Number the sets of pairs joined by nearly the same image, a caption, or a group: int64 (n,)."""
    n = len(pairs.pairs)
    members = np.arange(n)
    owners = np.repeat(members, pairs.pairs["captions"])
    alike = near_groups(pairs.pairs["look"])  # equal images look alike too
    captions = equal_groups(pairs.captions["hash"])
    known = members[named != 0]
    groups = equal_groups(named[known])
    # A graph of pairs and what they show: its connected components must not be separated.
    nodes = n
    edges = []
    for owner, group in ((members, alike), (owners, captions), (known, groups)):
        edges.append(np.stack([owner, nodes + group]))  # a node for each image, caption and group
        nodes += int(group.max(initial=-1)) + 1
    all_edges = np.concatenate(edges, axis=1)
    labels = components(nodes, all_edges)
    return equal_groups(labels[:n])


def _read(source: PairSource, progress: bool, fewest: int = FEWEST) -> ReadPairs:
    if len(source) < fewest:
        raise UserError(
            f"'{source.name}' has {plural(len(source), 'pair')}; fine-tuning needs {fewest} or more."
        )
    workers = None if len(source) > 2_000 else 0
    title = ""
    if progress:
        title = f"Comparing images of {source.name}"
    pairs = read(source, np.arange(len(source)), pair_row, workers, title)
    check_pairs(pairs, source.name, len(source))
    return pairs


def check_pairs(pairs: ReadPairs, name: str, total: int) -> None:
    """Refuse pairs of a source of `total` pairs that teach nothing: if none can be used, or all have one caption."""
    if not len(pairs.pairs):
        raise UserError(f"No pair of '{name}' can be used. {pairs.skipped.explanation()}")
    if len(np.unique(pairs.captions["hash"])) < 2 <= total:
        raise UserError(f"All pairs of '{name}' have the same caption. Describe each image.")
