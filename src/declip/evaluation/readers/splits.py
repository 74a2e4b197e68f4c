"""Splits: what readers return, and how one is drawn where a set has none."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from declip.data.pair import PairSource

Openers = Mapping[str, Callable[[], PairSource]]
"""What opens each split; keys among "train", "validation", "test"."""


def drawn_split(labels: Sequence[int], train: int, test: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw so many images of each class for training and, of the rest, for the test.

    Args:
        labels: n class numbers; the images in an order that does not depend on the machine.
        train: Images of each class; a class with no more keeps at least one for the test, where it has two.
        test: Images of each class; None takes all the rest.
        seed: Of the draw.

    Returns:
        Places in `labels` for "train" and "test", ascending.
    """
    generator = np.random.default_rng(seed)
    places: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    known = np.asarray(labels)
    for label in np.unique(known):
        order = generator.permutation(np.flatnonzero(known == label))
        count = min(train, max(len(order) - 1, 1))
        places["train"].append(order[:count])
        places["test"].append(order[count:][:test])
    return {which: np.sort(np.concatenate(parts)) for which, parts in places.items()}
