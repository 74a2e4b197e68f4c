"""Sampling and scoring class by class."""

from collections.abc import Callable

import numpy as np


def by_class(labels: np.ndarray) -> list[np.ndarray]:
    """The rows of each class that occurs, classes and rows ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def sample_per_class(labels: np.ndarray, count: Callable[[int], int], seed: int = 0) -> np.ndarray:
    """Sample `count(size)` rows of each class: (n,) bool. With the same seed, a larger sample holds a smaller one."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for rows in by_class(labels):
        chosen[generator.permutation(rows)[: count(len(rows))]] = True
    return chosen


def score(right: np.ndarray, labels: np.ndarray, metric: str = "top1") -> float:
    """Mean of `right`, (n,) bool: over rows for "top1", over the classes that occur for "mean_per_class"."""
    if metric == "top1":
        return float(right.mean())
    return float(np.mean([right[rows].mean() for rows in by_class(labels)]))
