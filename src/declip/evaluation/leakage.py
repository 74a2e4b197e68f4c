"""Find a column of a table whose equal values mark images of one object, which may be trained and measured on."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.data.pair import PairSource

# Of the other images with an equal value, the fraction among as many nearest ones. Three views of a product have 0.95,
# variants of an emoji 0.8; names, kinds, authors and categories of the built-in sets have 0.5 or less.
ALIKE = 0.5
# other images of an object, at most: the mean, and of all images
MOST_OTHERS = 20
MOST_SHARE = 0.05
# Fraction and number of images whose value is repeated
LEAST_REPEATED = 0.1
FEWEST = 10
# images compared, those whose nearest are looked for, and at a time
MOST = 20_000
QUERIES = 1_000
BLOCK = 100


def leaking_column(
    source: PairSource,
    indices: Sequence[int],
    images: Tensor,
    groups: np.ndarray,
    classes: int = 0,
) -> str | None:
    """Find the column not in use whose equal values mark images that are alike, although not left out together.

    Args:
        indices: Of the images in the source.
        images: (n, v) features of any length.
        groups: (n,) equal for images that are left out together.
        classes: Columns without more values than classes are those of the classes.

    Returns:
        Of several columns, the one with most values; None if there is none.
    """
    images = images.float()
    centered = normalize(images - images.mean(dim=0), dim=-1)
    values_of = dict[str, int]()
    for column, all_numbers in source.other_columns().items():
        numbers = all_numbers[indices]
        values = len(np.unique(numbers[numbers != 0]))
        if values > classes and _alike(centered, numbers, groups) >= ALIKE:
            values_of[column] = values
    return max(values_of, key=values_of.__getitem__, default=None)


def _alike(images: Tensor, numbers: np.ndarray, groups: np.ndarray) -> float:
    """How well nearness finds the images of other groups with an equal number, 0 to 1; 0 where these do not repeat."""
    rng = np.random.default_rng(0)
    # --- some of the values, each with all of its images; 0 is no value
    named = np.flatnonzero(numbers)
    values = np.unique(numbers[named], return_inverse=True)[1]
    order = rng.permutation(values.max(initial=0) + 1)
    by_value = np.argsort(order[values], kind="stable")
    rows = named[by_value[:MOST]]
    values = np.unique(numbers[rows], return_inverse=True)[1]
    own = np.unique(groups[rows], return_inverse=True)[1]
    # --- images that have others of their value, in another group
    both = np.stack([values, own])
    together = np.unique(both, axis=1, return_inverse=True)[1].reshape(-1)
    others = np.bincount(values)[values] - np.bincount(together)[together]
    repeated = np.flatnonzero(others)
    if len(repeated) < max(FEWEST, LEAST_REPEATED * len(rows)):
        return 0.0
    if others[repeated].mean() > min(MOST_OTHERS, MOST_SHARE * len(rows)):
        return 0.0
    # --- the nearest images of other groups
    candidates = images[rows]
    value = torch.from_numpy(values)
    group = torch.from_numpy(own)
    right = list[Tensor]()
    chosen = rng.permutation(repeated)[:QUERIES]
    for queries in torch.from_numpy(chosen).split(BLOCK):
        # (b, n), (b, 1)
        cosines = candidates[queries] @ candidates.mT
        wanted = torch.from_numpy(others)[queries, None]
        same_group = group[queries, None] == group
        cosines[same_group] = -torch.inf
        nearest = cosines.topk(int(wanted.max())).indices
        counted = torch.arange(nearest.shape[1]) < wanted
        hits = (value[nearest] == value[queries, None]) & counted
        right.append(hits.sum(dim=1) / wanted[:, 0])
    return float(torch.cat(right).mean())
