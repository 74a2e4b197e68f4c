"""What a person sees of a ranking: images with a value in a column, and near copies as one hit."""

import unicodedata
from collections.abc import Mapping, Sequence

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
    others = torch.triu_indices(len(some), len(some), offset=1)
    cosines = (some @ some.mT)[others[0], others[1]]
    alike = len(cosines) > 1 and bool(cosines.median() > NEAR_COPY)
    return NO_COPY if alike else NEAR_COPY


def distinct(
    ranking: Tensor,
    vectors: Tensor,
    k: int,
    groups: Sequence[str] | None,
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
        groups: By id; an empty one is no group.
        limit: Cosine above which an image is a near copy.

    Returns:
        Positions in the ranking, of each hit the best first.
    """
    hits: list[list[int]] = []
    hit_of_group: dict[str, int] = {}
    firsts = torch.empty(0, vectors.shape[1])  # vectors of the first images of hits
    for start in range(0, len(ranking), BLOCK):
        ids = ranking[start : start + BLOCK]
        rows = vectors[ids].float()
        compared = torch.cat([firsts, rows])
        copies = (rows @ compared.mT > limit).numpy()  # (b, hits + b)
        # --- the hit that each compared image began; -1: it began none
        hit_of = np.full(len(compared), -1)
        hit_of[: len(firsts)] = np.arange(len(firsts))
        for row, id in enumerate(ids.tolist()):
            group = groups[id] if groups else ""
            similar = np.flatnonzero(copies[row] & (hit_of >= 0))
            if group in hit_of_group:
                hit = hit_of_group[group]
            elif len(similar):
                hit = int(hit_of[similar[0]])
            elif len(hits) == k:
                return hits
            else:
                hit = len(hits)
                hits.append([])
                hit_of[len(firsts) + row] = hit
            if group:
                hit_of_group.setdefault(group, hit)
            hits[hit].append(start + row)
        firsts = compared[torch.from_numpy(hit_of >= 0)]
    return hits
