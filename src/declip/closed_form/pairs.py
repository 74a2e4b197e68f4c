"""What heads are fitted to: pairs in folds of cross-validation, and a classifier's classes."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from declip.closed_form.folds import assign_folds

FOLDS = 5
# Images that the choice is made on: the heads are of all, and so are their out-of-fold ranks
MOST = 5_000


class Pairs(NamedTuple):
    """Features of images and of all their captions.

    Each image counts once, however many captions it has.
    """

    images: Tensor  # (n, v)
    texts: Tensor  # (m, w)
    owners: Tensor  # (m,) int64, the image of each caption

    def of_images(self, rows: Tensor) -> "Pairs":
        """The pairs of some images (k,) int64, rising."""
        captions = torch.isin(self.owners, rows)
        owners = torch.searchsorted(rows, self.owners[captions])
        return Pairs(self.images[rows], self.texts[captions], owners)

    def mean_texts(self) -> Tensor:
        """The mean feature of each image's captions, (n, w)."""
        return mean_by_owner(self.texts, self.owners, len(self.images))


class ClassPairs(NamedTuple):
    """A classifier as image-text pairs (arXiv 2605.22484).

    The row of a class lies where its images lie.
    """

    rows: Tensor  # (c, v), the classifier's weights
    texts: Tensor  # (t, w), features of the classes' names and definitions
    owners: Tensor  # (t,) int64, the class of each text
    mean: Tensor  # (v,), mean feature of images, measured once for the start
    posteriors: bool = True  # whether an image's class posteriors are features too

    def mean_texts(self) -> Tensor:
        """The mean feature of each class's texts, (c, w)."""
        return mean_by_owner(self.texts, self.owners, len(self.rows))


class FitData(NamedTuple):
    """Pairs in folds of cross-validation, with a classifier's classes."""

    pairs: Pairs
    groups: np.ndarray  # (n,), equal for nearly the same image or the same caption
    folds: Tensor  # (n,) int64
    classes: ClassPairs | None = None
    one_space: bool = False  # features are embeddings of images and texts in one space
    seed: int = 0  # of the folds, and of the choice among many pairs

    @classmethod
    def of(
        cls,
        pairs: Pairs,
        groups: np.ndarray,
        classes: ClassPairs | None = None,
        *,
        one_space: bool = False,
        seed: int = 0,
    ) -> "FitData":
        """Divide pairs into folds; images with equal groups stay in one."""
        folds = torch.from_numpy(assign_folds(groups, FOLDS, seed))
        return cls(pairs, groups, folds, classes, one_space, seed)

    def sample(self) -> "FitData":
        """`MOST` random images at most, with their captions, in the same folds."""
        count = len(self.pairs.images)
        if count <= MOST:
            return self
        rows = random_rows(count, MOST, self.seed)
        pairs = self.pairs.of_images(rows)
        groups = self.groups[rows.numpy()]
        return self._replace(pairs=pairs, groups=groups, folds=self.folds[rows])


def random_rows(count: int, most: int, seed: int) -> Tensor:
    """`most` random numbers below `count`, or all of them, rising, int64."""
    if count <= most:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    return order[:most].sort().values


def mean_by_owner(rows: Tensor, owners: Tensor, count: int) -> Tensor:
    """Mean of the rows (m, w) of each owner (m,), (count, w)."""
    zeros = rows.new_zeros(count, rows.shape[1])
    sums = zeros.index_add(0, owners, rows)
    counts = torch.bincount(owners, minlength=count)
    return sums / counts[:, None]


def class_centers(rows: Tensor) -> Tensor:
    """A classifier's rows (c, v) without their mean.

    They are known up to a common vector, which softmax ignores.
    """
    return rows - rows.mean(dim=0)
