"""Find duplicates among many hashes by sorting, in nearly linear time."""

from itertools import combinations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

COARSE_BITS, FINE_BITS = 6, 24
"""Bits of 128 and of 512 in which the hashes of two near-duplicates may differ. Of the built-in photographs, drawings
and icons, 90 % and more of the copies at half the size or of JPEG quality 75 pass (photographs: all)."""

TINT = 16
"""Levels of 255 by which their mean red, green or blue may differ."""

BLOCKS = 8
"""Blocks of 16 bits. Hashes that differ in 6 bits are equal in at least two of 8 blocks, so among hashes sorted by each
pair of blocks, 28 in all, every pair of near-duplicates stands together once at least."""

REACH = 64
"""How far apart two hashes may stand among those with the same two blocks. There are rarely so many; where there are
(blank margins, one template) some near-duplicates are met through a third only, and the work stays linear."""

_SET = np.array([number.bit_count() for number in range(256)], np.uint8)


def equal_groups(hashes: np.ndarray) -> np.ndarray:
    """Number the groups of equal hashes, (n,): each one's group, int64 (n,), in the order of first members."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[group]


def near_groups(looks: np.ndarray) -> np.ndarray:
    """Number the groups of images that look alike, by (n,) `LOOK`s; those joined through a third image are one group.

    Returns:
        The group of each, int64 (n,), in the order in which each is first met.
    """
    # Looks that are equal are merged here, found by a dot product with random odd numbers, modulo 2^64.
    words = [looks[name][:, place] for name in ("coarse", "fine", "tint") for place in range(looks[name].shape[1])]
    factors = np.random.default_rng(0).integers(0, 2**63, len(words), dtype=np.uint64) * 2 + 1
    mixed = np.zeros(len(looks), np.uint64)
    for word, factor in zip(words, factors, strict=True):
        mixed += word * factor
    _, first, equal = np.unique(mixed, return_index=True, return_inverse=True)
    return equal_groups(_joined(looks[first])[equal])


def _joined(looks: np.ndarray) -> np.ndarray:
    """A label of the group that each of n different `LOOK`s is in, int64 (n,)."""
    coarse, fine = (np.ascontiguousarray(looks[name]) for name in ("coarse", "fine"))
    tints = looks["tint"].astype(np.int16)
    blocks = coarse.view(np.uint16).astype(np.uint32)
    labels = np.arange(len(looks))
    for first, second in combinations(range(BLOCKS), 2):
        key = blocks[:, first] << 16 | blocks[:, second]
        order = np.argsort(key, kind="stable")
        key = key[order]
        places = np.arange(len(key) - 1)
        edges = []
        for shift in range(1, REACH + 1):
            places = places[places + shift < len(key)]
            places = places[key[places] == key[places + shift]]
            if not len(places):
                break
            pair = np.stack([order[places], order[places + shift]])
            pair = pair[:, labels[pair[0]] != labels[pair[1]]]
            for hashes, most in ((coarse, COARSE_BITS), (fine, FINE_BITS)):
                pair = pair[:, _ones(hashes[pair[0]] ^ hashes[pair[1]]) <= most]
            pair = pair[:, np.abs(tints[pair[0]] - tints[pair[1]]).max(1, initial=0) <= TINT]
            edges.append(labels[pair])
            # Joined early, so that the many of one group are not compared over and over.
            if shift.bit_count() == 1:
                labels, edges = _join(labels, edges), []
        labels = _join(labels, edges)
    return labels


def _ones(words: np.ndarray) -> np.ndarray:
    """Bits that are set in each row."""
    return _SET[words.view(np.uint8)].sum(1, dtype=np.int64)


def _join(labels: np.ndarray, edges: list[np.ndarray]) -> np.ndarray:
    """Give all labels that edges, (2, e) each, lead between the smallest of them."""
    if not any(each.size for each in edges):
        return labels
    met, ends = np.unique(np.concatenate(edges, axis=1), return_inverse=True)
    one, other = ends.reshape(2, -1)
    graph = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(met), len(met)))
    component = connected_components(graph, directed=False)[1]
    smallest = met[np.unique(component, return_index=True)[1]]
    table = np.arange(len(labels))
    table[met] = smallest[component]
    return table[labels]


def across(pairs: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Find the pairs, (n,) with a field "look", whose image looks like one of `others`: bool (n,)."""
    groups = near_groups(np.concatenate([pairs["look"], others["look"]]))
    return np.isin(groups[: len(pairs)], groups[len(pairs) :])


def repeated(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and sizes of the groups that have several members, the largest first."""
    sizes = np.bincount(groups)
    order = np.argsort(-sizes, kind="stable")
    order = order[sizes[order] > 1]
    return order, sizes[order]


def coincidence(groups: np.ndarray, weights: np.ndarray, count: int) -> float:
    """Estimate how likely two random pairs share one.

    Args:
        groups: (k,) what may be shown, from 0: the group of a caption, say. No pair has one of them twice.
        weights: (k,) how likely its pair is to show it; the weights of a pair add up to 1.
        count: Number of pairs.

    Returns:
        The mean over all ordered pairs of different pairs, which for a random sample is an unbiased
        estimate of theirs; 0 for a single pair.
    """
    if count < 2:
        return 0.0
    together = np.bincount(groups, weights)
    own = float((weights**2).sum())
    return max(0.0, (float((together**2).sum()) - own) / (count * (count - 1)))
