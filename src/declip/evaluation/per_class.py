"""Sampling and scoring by class."""

from collections.abc import Callable

import numpy as np


def by_class(labels: np.ndarray) -> list[np.ndarray]:
    """Group rows by class, for the classes that occur; classes and rows ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def sample_per_class(labels: np.ndarray, count: Callable[[int], int], seed: int = 0) -> np.ndarray:
    """Sample `count(size)` rows of each class: (n,) bool. With one seed, a larger sample includes a smaller one."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for rows in by_class(labels):
        chosen[generator.permutation(rows)[: count(len(rows))]] = True
    return chosen


def score(correct: np.ndarray, labels: np.ndarray, metric: str = "top1") -> float:
    """Mean of `correct`, (n,) bool: over rows for "top1", over the classes that occur for "mean_per_class"."""
    if metric == "top1":
        return float(correct.mean())
    return float(np.mean([correct[rows].mean() for rows in by_class(labels)]))
