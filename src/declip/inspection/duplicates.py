"""Hashes of images and captions, and finding duplicates among many by sorting, in nearly linear time."""

from hashlib import blake2b
from itertools import combinations

import numpy as np
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from declip.data.text.tokenizer import clean

COARSE, FINE = 8, 16  # steps to the right and down that a small copy has: hashes of 128 and of 512 bits
LOOK = np.dtype([("coarse", np.uint64, (2,)), ("fine", np.uint64, (8,)), ("tint", np.uint8, (3,))])  # 83 bytes
STEP = 2  # gray levels by which a neighbor must be brighter to count, so that flat areas do not hash their noise

# Bits of 128 and of 512 in which the hashes of two near-duplicates may differ, and levels of 255 by which their mean
# red, green or blue may. Of the built-in photographs, drawings and icons, 90 % and more of the copies at half the size
# or of JPEG quality 75 pass (photographs: all).
COARSE_BITS, FINE_BITS, TINT = 6, 24, 16

# Blocks of 16 bits. Hashes that differ in 6 bits are equal in at least two of 8 blocks, so among hashes sorted by each
# pair of blocks, 28 in all, every pair of near-duplicates is adjacent at least once.
BLOCKS = 8

# Maximum distance of two hashes among those with the same two blocks, so that the work stays linear. If there are more
# (blank margins, one template) some near-duplicates are connected only through a third.
REACH = 64

SET_BITS = np.array([number.bit_count() for number in range(256)], np.uint8)


def image_hash(image: Image.Image) -> int:
    """64 bits of an RGB image's size and pixels: equal for equal images; a collision has probability 1 in 10^19."""
    return _hash(repr(image.size).encode() + image.tobytes())


def caption_hash(caption: str) -> int:
    """64 bits of a caption as the tokenizer cleans it: captions that a model cannot distinguish have one hash."""
    return _hash(clean(caption).encode())


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def look(image: Image.Image) -> np.ndarray:
    """Hash the appearance of an image: where it gets brighter, and its mean color.

    The hashes are dHash (Krawetz 2013) in both directions: one bit for each of 8 x 8, or 16 x 16, gray pixels of a
    small copy that says whether its right, or lower, neighbor is brighter. The coarse one is quick to search by.
    """
    small, larger = (
        np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0), np.float32)
        for side in (COARSE + 1, FINE + 1)
    )
    return np.array((_brighter(small), _brighter(larger), small.mean((0, 1)).round().astype(np.uint8)), LOOK)


def _brighter(small: np.ndarray) -> np.ndarray:
    gray = small @ np.array([0.299, 0.587, 0.114], np.float32)
    right = gray[:-1, 1:] - gray[:-1, :-1] > STEP
    down = gray[1:, :-1] - gray[:-1, :-1] > STEP
    return np.packbits(np.stack([right, down])).view(np.uint64)


def equal_groups(hashes: np.ndarray) -> np.ndarray:
    """Number the groups of equal hashes (n,): int64 (n,), in the order of first members."""
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    return number[group]


def near_groups(looks: np.ndarray) -> np.ndarray:
    """Number the groups of images that look alike, also through a third, by (n,) `LOOK`s: int64 (n,)."""
    raw = np.ascontiguousarray(looks).view(np.dtype((np.void, looks.itemsize)))
    _, first, equal = np.unique(raw, return_index=True, return_inverse=True)
    return equal_groups(_joined(looks[first])[equal])


def components(count: int, edges: np.ndarray) -> np.ndarray:
    """Label the connected components of nodes 0 to `count` - 1 and edges (2, e): (count,)."""
    graph = coo_array((np.ones(edges.shape[1], bool), edges), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _joined(looks: np.ndarray) -> np.ndarray:
    """A label of the group that each of n different `LOOK`s is in, (n,)."""
    coarse, fine = (np.ascontiguousarray(looks[name]) for name in ("coarse", "fine"))
    tints = looks["tint"].astype(np.int16)
    blocks = coarse.view(np.uint16).astype(np.uint32)
    labels = np.arange(len(looks))
    for first, second in combinations(range(BLOCKS), 2):
        # --- hashes that are equal in two blocks become neighbors
        key = blocks[:, first] << 16 | blocks[:, second]
        order = np.argsort(key, kind="stable")
        key = key[order]
        places = np.arange(len(key) - 1)
        for shift in range(1, REACH + 1):
            places = places[places + shift < len(key)]
            places = places[key[places] == key[places + shift]]
            if not len(places):
                break
            # --- (2, candidates), without those that are joined already; then those that are near
            pair = np.stack([order[places], order[places + shift]])
            pair = pair[:, labels[pair[0]] != labels[pair[1]]]
            for hashes, most in ((coarse, COARSE_BITS), (fine, FINE_BITS)):
                differing = SET_BITS[(hashes[pair[0]] ^ hashes[pair[1]]).view(np.uint8)].sum(1, dtype=np.int64)
                pair = pair[:, differing <= most]
            pair = pair[:, np.abs(tints[pair[0]] - tints[pair[1]]).max(1, initial=0) <= TINT]
            if pair.size:
                labels = components(len(looks), labels[pair])[labels]
    return labels


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
