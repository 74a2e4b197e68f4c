"""Images of an index that are nearly the same to the model, and captions that come more than once."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from declip.app.jobs import Progress
from declip.errors import UserError
from declip.search.index import Index

NEIGHBOURS = 8
"""Nearest images of each that are looked at: larger groups are joined through several members."""

LOWEST = 0.8
"""Cosine below which two images are never shown as near-duplicates."""

MOST = 50_000
"""Images that are compared exactly with each other: about a minute on two cores."""

BLOCK = 512
"""Images that are looked up at a time."""


@dataclass(frozen=True)
class Group:
    """Images that belong together.

    Attributes:
        ids: Two or more, rising.
        cosine: The largest between two of them.
    """

    ids: list[int]
    cosine: float


@dataclass(frozen=True)
class Couples:
    """Pairs of images whose cosine is `LOWEST` or more.

    Attributes:
        one: (m,) int64 ids.
        other: (m,) int64 ids.
        cosines: (m,) float32.
    """

    one: np.ndarray
    other: np.ndarray
    cosines: np.ndarray

    def groups(self, threshold: float) -> list[Group]:
        """Groups joined by cosines of at least `threshold`, the most alike first."""
        chosen = self.cosines >= threshold
        if not chosen.any():
            return []
        ends = np.stack([self.one[chosen], self.other[chosen]])
        ids, places = np.unique(ends, return_inverse=True)
        one, other = places.reshape(2, -1)
        joined = coo_array((np.ones(len(one), bool), (one, other)), shape=(len(ids), len(ids)))
        count, label = connected_components(joined, directed=False)
        largest = np.full(count, -np.inf, np.float32)
        np.maximum.at(largest, label[one], self.cosines[chosen])
        members = np.split(ids[np.argsort(label, kind="stable")], np.cumsum(np.bincount(label))[:-1])
        found = [Group(own.tolist(), float(top)) for own, top in zip(members, largest, strict=True)]
        return sorted(found, key=lambda group: (-group.cosine, group.ids))


def find_couples(index: Index, tell: Progress) -> Couples:
    """Compare the images of an index with each other.

    Args:
        index: Up to `MOST` images, or more with an approximate index.
        tell: Is told the share that is done.

    Raises:
        UserError: There are too many images to be compared exactly.
    """
    ids = index.ids
    if len(ids) > MOST and index.manifest.approximate is None:
        raise UserError(
            f"{len(ids):,} images are too many to be compared with each other exactly (at most {MOST:,}). Make an "
            "approximate index first: declip index approximate INDEX"
        )
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for start in range(0, len(ids), BLOCK):
        block = ids[start : start + BLOCK]
        near, cosines = (each.numpy() for each in index.nearest(index.vectors(block), NEIGHBOURS + 1))
        mine = np.repeat(block, near.shape[1]).reshape(near.shape)
        alike = (near != mine) & (cosines >= LOWEST)
        found.append((mine[alike], near[alike], cosines[alike]))
        tell(min(1.0, (start + BLOCK) / len(ids)))
    one, other, values = (np.concatenate(each) for each in zip(*found, strict=True))
    # Each couple once: most are met from both sides.
    first, second = np.minimum(one, other), np.maximum(one, other)
    _, kept = np.unique(np.stack([first, second]), axis=1, return_index=True)
    return Couples(first[kept], second[kept], values[kept].astype(np.float32))


def equal_captions(index: Index) -> list[Group]:
    """Images whose first captions are the same but for case and white space, the largest group first."""
    owners: dict[str, list[int]] = defaultdict(list)
    for id, caption in zip(index.ids.tolist(), index.captions(), strict=True):
        if caption:
            owners[" ".join(caption.casefold().split())].append(id)
    groups = [Group(ids, 1.0) for ids in owners.values() if len(ids) > 1]
    return sorted(groups, key=lambda group: (-len(group.ids), group.ids))
