"""Folds of cross-validation, and ridge regression with several penalties from one decomposition."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


def assign_folds(groups: np.ndarray, folds: int, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Assign groups to folds of nearly equal size: the largest first, equal ones in random order. (n,) int64."""
    names, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled, fold_of = np.zeros(folds, np.int64), np.zeros(len(names), np.int64)
    for group in order:
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += sizes[group]
    return fold_of[numbers]


class PrincipalAxes(NamedTuple):
    """Eigenvectors of a matrix of second moments, with the moment along each."""

    moments: Tensor  # (v,), rising, not negative
    axes: Tensor  # (v, v), columns

    @classmethod
    def of(cls, matrix: Tensor) -> "PrincipalAxes":
        """Decompose a symmetric matrix (v, v), in time O(v³)."""
        moments, axes = torch.linalg.eigh(matrix)
        return cls(moments.clamp(min=0), axes)

    def ridge(self, target: Tensor, penalties: Iterable[float]) -> list[Tensor]:
        """Compute (M + penalty I)⁻¹ target of the matrix M for each penalty, (v, c) each."""
        rotated = self.axes.mT @ target
        return [self.axes @ (rotated / (self.moments + penalty)[:, None]) for penalty in penalties]
