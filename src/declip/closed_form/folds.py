"""Folds of cross-validation."""

import numpy as np


def assign_folds(groups: np.ndarray, folds: int, seed: int | np.random.Generator = 0) -> np.ndarray:
    """Assign groups to folds of nearly equal size: the largest first, equal ones in random order.

    (n,) int64.
    """
    names, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    largest_first = np.argsort(-sizes[shuffled], kind="stable")
    filled = np.zeros(folds, np.int64)
    fold_of = np.zeros(len(names), np.int64)
    for group in shuffled[largest_first]:
        smallest = filled.argmin()
        fold_of[group] = smallest
        filled[smallest] += sizes[group]
    return fold_of[numbers]
