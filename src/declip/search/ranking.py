"""Hits of a ranking: only images with given values in columns, and near copies as one hit."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, tee

import numpy as np
import torch
from torch import Tensor

from declip.errors import unknown
from declip.io.text import sanitize

NEAR_COPY = 0.99  # cosine above which two images are one hit
NO_COPY = 2.0  # above every cosine
SAMPLE = 100  # images whose cosines say whether a model tells images apart
LONGEST_SHOWN = 60  # characters of a value in a message
BLOCK = 256  # images that are compared with the hits at a time

Where = Mapping[str, str | Sequence[str]]
"""A value, or several of which each is accepted, by column."""
Cells = Sequence[tuple[str, ...]]
"""The cells of a column: of each image those of its rows."""


def matching(columns: Mapping[str, Cells], where: Where) -> np.ndarray:
    """The rising positions (m,) int64 of images that have one of the values in every column."""
    matches = []
    for name, given in where.items():
        values = [given] if isinstance(given, str) else given
        wanted = {_plain(str(value)): str(value) for value in values}
        cells = [{_plain(cell) for cell in row} for row in columns[name]]
        known = set[str]().union(*cells)
        for value in wanted.keys() - known:
            shown = {sanitize(cell, LONGEST_SHOWN) for cell in known if cell}
            raise unknown(f"value of {name}", wanted[value], shown)
        matches.append([not wanted.keys().isdisjoint(row) for row in cells])
    return np.flatnonzero(np.all(matches, axis=0))


def _plain(cell: str) -> str:
    """A cell without spaces around it, and with one of the two codes of an umlaut."""
    return unicodedata.normalize("NFC", cell.strip())


def near_copy(vectors: Tensor) -> float:
    """The cosine above which two images are one hit; above 1 if most images are as similar as that.

    So a model that was hardly trained, to which all images look alike, lists them all.

    Args:
        vectors: Of all images, (n, d) of length 1, of which some are compared.
    """
    step = max(1, len(vectors) // SAMPLE)
    some = vectors[::step][:SAMPLE].float()
    rows, columns = torch.triu_indices(len(some), len(some), offset=1)
    products = some @ some.mT
    cosines = products[rows, columns]  # of each two images
    alike = len(cosines) > 1 and bool(cosines.median() > NEAR_COPY)
    if alike:
        return NO_COPY
    return NEAR_COPY


def distinct(
    ranking: Tensor,
    vectors: Tensor,
    k: int,
    groups: Cells | None,
    limit: float = NEAR_COPY,
) -> list[list[int]]:
    """Divide a ranking into k hits: an image with its near copies, and with others of its group.

    The plain loop::

        for position, id in enumerate(ranking):
            hit = first hit whose first image is of the same group, else whose first image is a near copy
            hit.append(position), or a new hit; stop before hit k + 1

    So images that rank below the next hit are not counted.

    Args:
        ranking: Ids (m,), the best first.
        vectors: Of all images by id, (n, d) of length 1.
        groups: By id, the first cell of each; an empty one is no group.
        limit: Cosine above which an image is a near copy.

    Returns:
        Positions in the ranking, of each hit the best first.
    """
    keys, again = tee(_keys(ranking, groups))  # read as far as needed, twice
    hit_of, end = _assign(keys, ranking, vectors, k, limit)
    hits: list[list[int]] = [[] for _ in {*hit_of.values()}]
    for position, key in enumerate(islice(again, end)):
        hits[hit_of[key]].append(position)
    return hits


Key = str | int
"""The group of an image, or its position in the ranking if it has none."""


def _assign(
    keys: Iterable[Key], ranking: Tensor, vectors: Tensor, k: int, limit: float
) -> tuple[dict[Key, int], int]:
    """The hit of each key, and the position at which hit k + 1 would begin.

    Only the first image with a key is compared with hits: the others follow it.
    """
    hit_of: dict[Key, int] = {}
    firsts = _firsts(keys)
    begun = torch.empty(0, vectors.shape[1])  # (hits, d), of the first image of each
    while block := list(islice(firsts, BLOCK)):
        positions = [position for _, position in block]
        rows = vectors[ranking[positions]].float()
        compared = torch.cat([begun, rows])
        copies = (rows @ compared.mT > limit).numpy()  # (b, hits + b)
        begins = np.arange(len(compared)) < len(begun)  # rows of `compared` that begin a hit
        for row, (key, position) in enumerate(block):
            first = len(begun) + row
            similar = np.flatnonzero(copies[row] & begins)
            if len(similar):
                first = similar[0]
            elif begins.sum() == k:
                return hit_of, position
            begins[first] = True
            hit_of[key] = int(begins[:first].sum())
        begun = compared[torch.from_numpy(begins)]
    return hit_of, len(ranking)


def _keys(ranking: Tensor, groups: Cells | None) -> Iterable[Key]:
    if groups is None:
        return range(len(ranking))
    return (groups[id][0] or position for position, id in enumerate(ranking.tolist()))


def _firsts(keys: Iterable[Key]) -> Iterator[tuple[Key, int]]:
    """Each key with its first position."""
    seen = set[Key]()
    for position, key in enumerate(keys):
        if key not in seen:
            seen.add(key)
            yield key, position
