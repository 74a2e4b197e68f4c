"""Splitting pairs into a training and a validation part that share no image and no caption."""

from typing import NamedTuple

import numpy as np

from declip.data.pair import PairSource
from declip.errors import UserError
from declip.inspection.duplicates import across, components, equal_groups, near_groups
from declip.inspection.reading import ReadPairs, read
from declip.io.text import percent, plural

FRACTION, MOST, FEWEST = 0.1, 5_000, 20
"""Fraction of the pairs that the validation part has, and at most how many; pairs of which a part can be split off."""

COPIED = 0.5
"""Fraction of copied validation images above which a validation set is refused."""


class PairSplit(NamedTuple):
    """Indices of the two parts in the source, rising; pairs that cannot be read are in the training part."""

    train: np.ndarray
    val: np.ndarray


def split_pairs(source: PairSource, fraction: float = FRACTION, most: int = MOST, progress: bool = False) -> PairSplit:
    """Split off a validation part: pairs with nearly the same image, the same caption, or one group stay together.

    Groups of such pairs are put into the validation part in an order that depends on the number of pairs alone, as long
    as they fit.

    Raises:
        UserError: there are too few pairs, or they are one group.
    """
    pairs = _read(source, progress)
    groups = _related(pairs, source)
    sizes = np.bincount(groups)
    target = max(1, min(round(fraction * len(groups)), most))
    chosen, left = [], target
    for group in np.random.default_rng((0, len(groups))).permutation(len(sizes)).tolist():
        if sizes[group] <= left:
            chosen.append(group)
            left -= int(sizes[group])
    if left > target // 2:
        raise UserError(
            f"No validation part can be split off '{source.name}': its {len(groups):,} pairs make "
            f"{len(sizes):,} groups with the same captions or images, the largest of {sizes.max():,} pairs. "
            "Write captions that differ, or give a validation set with --val."
        )
    val = pairs.pairs["place"][np.isin(groups, chosen)]
    return PairSplit(np.setdiff1d(np.arange(len(source)), val), val)


def check_copies(train: PairSource, val: PairSource, progress: bool = False) -> str | None:
    """Look for validation images among the training images; give a warning where there are some.

    Raises:
        UserError: half of the validation images and more are there.
    """
    pairs, held_out = _read(train, progress).pairs, _read(val, progress, fewest=1).pairs
    copies = float(across(held_out, pairs).mean())
    words = f"{percent(copies)} of the images of '{val.name}' are training images too, or nearly the same"
    if copies >= COPIED:
        raise UserError(f"{words}, so it shows nothing. Give other pairs with --val, or leave it out.")
    return f"{words}: its numbers are too high by what was memorized." if copies else None


def _related(pairs: ReadPairs, source: PairSource) -> np.ndarray:
    """Number the sets of pairs joined by nearly the same image, a caption, or the source's groups: int64 (n,)."""
    n = len(pairs.pairs)
    members, owners = np.arange(n), np.repeat(np.arange(n), pairs.pairs["captions"])
    same, alike = equal_groups(pairs.pairs["exact"]), near_groups(pairs.pairs["look"])
    nodes, edges = n, []
    named = np.array([source.group(place) for place in pairs.pairs["place"].tolist()])
    groups = (members[named != 0], equal_groups(named[named != 0]))
    for owner, group in ((members, same), (members, alike), (owners, equal_groups(pairs.captions["hash"])), groups):
        edges.append(np.stack([owner, nodes + group]))  # a node for each image, caption and group
        nodes += int(group.max(initial=-1)) + 1
    return equal_groups(components(nodes, np.concatenate(edges, axis=1))[:n])


def _read(source: PairSource, progress: bool, fewest: int = FEWEST) -> ReadPairs:
    if len(source) < fewest:
        raise UserError(f"'{source.name}' has {plural(len(source), 'pair')}; give {fewest} or more to fine-tune on.")
    workers = None if len(source) > 2_000 else 0
    pairs = read(source, np.arange(len(source)), workers, f"Comparing images of {source.name}" if progress else "")
    if not len(pairs.pairs):
        raise UserError(f"No pair of '{source.name}' can be used. {pairs.skipped.explanation()}")
    if len(np.unique(pairs.captions["hash"])) < 2:
        raise UserError(f"All pairs of '{source.name}' have one caption. Write what each image shows.")
    return pairs
