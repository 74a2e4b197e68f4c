"""Data of a probe: labeled features of three splits."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.datasets import Dataset, LabeledSource, with_classes
from declip.evaluation.feature_cache import FeatureCache

HELD_OUT = 0.2
"""Fraction of each class's training images that choices are made on where a dataset has no validation split."""


@dataclass(frozen=True)
class Labeled:
    """Features (n, width) float32 with their classes (n,) int64, on the CPU."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray | Tensor) -> "Labeled":
        """Select rows."""
        rows = torch.as_tensor(rows)
        return Labeled(self.features[rows], self.labels[rows])

    def join(self, other: "Labeled") -> "Labeled":
        """Append the other's rows."""
        return Labeled(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


@dataclass(frozen=True)
class ProbeData:
    """The splits of a dataset as a model sees them.

    Attributes:
        train: Images that probes fit on.
        validation: Images that choices are made on; never test images.
        test: Images that are reported.
        held_out: Origin of `validation`: "validation split" or "fifth of train".
        metric: The dataset's own: "top1" or "mean_per_class".
        skipped: Number of images of all splits that could not be read, by reason.
        device: The model's device, where probes compute.
    """

    dataset: str
    classes: int
    train: Labeled
    validation: Labeled
    test: Labeled
    held_out: str = "validation split"
    features: str = "backbone"
    metric: str = "top1"
    skipped: dict[str, int] | None = None
    device: torch.device | str = "cpu"

    @property
    def about(self) -> dict[str, Any]:
        """The fields of `declip.evaluation.results.ProbeResult`."""
        return {
            "dataset": self.dataset,
            "n": len(self.test),
            "classes": self.classes,
            "train": len(self.train) + len(self.validation),
            "features": self.features,
            "width": self.test.features.shape[1],
            "metric": self.metric,
            "skipped": dict(self.skipped or {}),
        }


def check_probe(dataset: Dataset, probe: str, *, chooses: bool) -> None:
    """Check that a dataset can be probed, before anything is encoded.

    Args:
        chooses: Whether the probe needs images to choose something on, in addition to those it fits on.
    """
    # A split without classes can still be used for retrieval.
    has_classes = getattr(dataset.split("test"), "class_names", None) is not None
    others = f"It can be measured by: {{}}{'zero-shot, ' if has_classes else ''}retrieval."
    if not dataset.has("train"):
        raise UserError(f"'{dataset.name}' has no train split, and {probe} learns from one. {others.format('')}")
    splits = _splits(dataset)
    names = tuple(splits["test"].class_names)
    for which, source in splits.items():
        if tuple(source.class_names) != names:
            raise UserError(
                f"The {which} split of '{dataset.name}' has {len(source.class_names)} class names, and they are not "
                f"the {len(names)} of its test split in the same order. A probe needs the same."
            )
        labels = np.asarray(source.labels)
        if labels.min() < 0 or labels.max() >= len(names):
            raise UserError(
                f"The {which} split of '{dataset.name}' has labels from {labels.min()} to {labels.max()}, but its "
                f"{len(names)} class names are numbered from 0."
            )
    counts = np.bincount(splits["train"].labels, minlength=len(names))
    if chooses and (counts >= 2).sum() <= len(counts) / 2:
        raise UserError(
            f"'{dataset.name}' has {counts.sum():,} training images for {len(counts):,} classes, and fewer than two "
            f"for {(counts < 2).sum():,} of them: too few to fit on some and choose the penalty on others, as "
            f"{probe} does. {others.format('knn, ')}"
        )


def read_probe_data(dataset: Dataset, cache: FeatureCache, device: torch.device | str = "cpu") -> ProbeData:
    """Encode the splits of a dataset that passes `check_probe`.

    Where there is no validation split, a fifth of each class's training images, chosen with a fixed seed, takes its
    place and is not fitted on until the choice is made.
    """
    parts: dict[str, Labeled] = {}
    skipped: Counter[str] = Counter()
    splits = _splits(dataset)
    for which, source in splits.items():
        features = cache.images(source, which)
        labels = torch.from_numpy(np.asarray(source.labels, dtype=np.int64)[features.indices])
        parts[which] = Labeled(features.images, labels)
        skipped.update(features.skipped.counts)
    held_out = "validation split"
    if "validation" not in parts:
        held_out = "fifth of train"
        chosen = stratified(parts["train"].labels.numpy())
        parts["validation"], parts["train"] = parts["train"].take(chosen), parts["train"].take(~chosen)
    return ProbeData(
        dataset=dataset.name,
        classes=len(splits["test"].class_names),
        held_out=held_out,
        features=cache.kind,
        metric=dataset.metric,
        skipped=dict(skipped),
        device=device,
        **parts,
    )


def stratified(labels: np.ndarray, fraction: float = HELD_OUT, seed: int = 0) -> np.ndarray:
    """Sample a fraction of each class, to the nearest whole image, one at least where it has two or more: (n,) bool."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for rows in by_class(labels):
        count = max(1, round(fraction * len(rows))) if len(rows) > 1 else 0
        chosen[generator.permutation(rows)[:count]] = True
    return chosen


def by_class(labels: np.ndarray) -> list[np.ndarray]:
    """The rows of each class that occurs, classes and rows ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def score(right: np.ndarray, labels: np.ndarray, metric: str = "top1") -> float:
    """Mean of `right`, (n,) bool: over rows for "top1", over the classes that occur for "mean_per_class"."""
    if metric == "top1":
        return float(right.mean())
    size = np.bincount(labels)
    return float((np.bincount(labels, weights=right)[size > 0] / size[size > 0]).mean())


def _splits(dataset: Dataset) -> dict[str, LabeledSource]:
    names = [which for which in ("train", "validation", "test") if dataset.has(which)]
    return {which: with_classes(dataset.split(which)) for which in names}
