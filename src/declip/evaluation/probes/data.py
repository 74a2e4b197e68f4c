"""What a probe learns from and is measured on: labeled features of three splits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from declip.errors import UserError
from declip.evaluation.datasets import Dataset, LabeledSource, with_classes
from declip.evaluation.feature_cache import FeatureCache

HELD_OUT = 0.2
"""Share of each class's training images that choices are made on where a set has no validation split."""


@dataclass(frozen=True)
class Labeled:
    """Features with their classes.

    Attributes:
        features: (n, width) float32 on the CPU.
        labels: (n,) int64.
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray | Tensor) -> "Labeled":
        """Some of the rows."""
        rows = torch.as_tensor(rows)
        return Labeled(self.features[rows], self.labels[rows])

    def join(self, other: "Labeled") -> "Labeled":
        """These rows, then the other's."""
        return Labeled(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


@dataclass(frozen=True)
class ProbeData:
    """The three splits of a set as a model sees them.

    Attributes:
        on: Name of the set.
        classes: How many classes there are.
        train: What probes fit on.
        validation: What choices are made on; never a test image.
        test: What is reported.
        held_out: Where `validation` comes from: "validation split" or "fifth of train".
        features: "backbone" or "embedding".
        metric: The set's own: "top1" or "mean_per_class".
        skipped: Images of all splits that could not be read: reason to count.
        device: Where the model is, and where probes compute.
    """

    on: str
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
    def about(self) -> dict[str, object]:
        """What every probe's result says."""
        return {
            "on": self.on,
            "n": len(self.test),
            "classes": self.classes,
            "train": len(self.train) + len(self.validation),
            "features": self.features,
            "width": self.test.features.shape[1],
            "metric": self.metric,
            "skipped": dict(self.skipped or {}),
        }


def check_probe(dataset: Dataset, protocol: str, *, chooses: bool) -> None:
    """Check that a set can be probed, before anything is encoded.

    Args:
        dataset: The set.
        protocol: The probe's name, for the message.
        chooses: Whether the probe needs images to choose something on, beside those it fits on.

    Raises:
        UserError: there is no train split, the splits' classes differ, or most classes have too few images.
    """
    if not dataset.has("train"):
        raise UserError(
            f"'{dataset.name}' has no train split, and {protocol} learns from one. It can be measured by: "
            f"{', '.join(_without_training(dataset))}."
        )
    splits = _splits(dataset)
    for which, source in splits.items():
        if tuple(source.class_names) != tuple(splits["test"].class_names):
            raise UserError(
                f"The {which} split of '{dataset.name}' has {len(source.class_names)} class names, and they are not "
                f"the {len(splits['test'].class_names)} of its test split in the same order. A probe needs the same."
            )
        labels = np.asarray(source.labels)
        if labels.min() < 0 or labels.max() >= len(source.class_names):
            raise UserError(
                f"The {which} split of '{dataset.name}' has labels from {labels.min()} to {labels.max()}, but its "
                f"{len(source.class_names)} class names are numbered from 0."
            )
    counts = np.bincount(splits["train"].labels, minlength=len(splits["train"].class_names))
    if chooses and (counts >= 2).sum() <= len(counts) / 2:
        raise UserError(
            f"'{dataset.name}' has {counts.sum():,} training images for {len(counts):,} classes, and fewer than two "
            f"for {(counts < 2).sum():,} of them: too few to fit on some and choose the penalty on others, as "
            f"{protocol} does. It can be measured by: knn, {', '.join(_without_training(dataset))}."
        )


def read_probe_data(dataset: Dataset, cache: FeatureCache, device: torch.device | str = "cpu") -> ProbeData:
    """Encode the splits of a set.

    Where there is no validation split, a fifth of each class's training images, drawn with a fixed seed, takes its
    place and is not fitted on until the choice is made.

    Args:
        dataset: A set that `check_probe` lets pass.
        cache: Encodes, or finds encoded.
        device: Where the probes shall compute.

    Raises:
        UserError: not one image of a split can be read.
    """
    parts: dict[str, Labeled] = {}
    skipped: Counter[str] = Counter()
    splits = _splits(dataset)
    for which, source in splits.items():
        found = cache.images(source, which)
        labels = torch.from_numpy(np.asarray(source.labels, dtype=np.int64)[found.indices])
        parts[which] = Labeled(found.features, labels)
        skipped.update(found.skipped.counts)
    held_out = "validation split"
    if "validation" not in parts:
        held_out = "fifth of train"
        chosen = stratified(parts["train"].labels.numpy())
        parts["validation"], parts["train"] = parts["train"].take(chosen), parts["train"].take(~chosen)
    return ProbeData(
        on=dataset.name,
        classes=len(splits["test"].class_names),
        held_out=held_out,
        features=cache.kind,
        metric=dataset.metric,
        skipped=dict(skipped),
        device=device,
        **parts,
    )


def stratified(labels: np.ndarray, share: float = HELD_OUT, seed: int = 0) -> np.ndarray:
    """Draw a share of each class, to the nearest whole image, one at least where it has two or more.

    Args:
        labels: (n,) int64.
        share: Of each class.
        seed: Of the draw.

    Returns:
        (n,) bool, True for what was drawn.
    """
    generator = np.random.default_rng(seed)
    drawn = np.zeros(len(labels), dtype=bool)
    for places in by_class(labels):
        count = max(1, round(share * len(places))) if len(places) > 1 else 0
        drawn[generator.permutation(places)[:count]] = True
    return drawn


def by_class(labels: np.ndarray) -> list[np.ndarray]:
    """The places of each class that occurs, classes and places ascending."""
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def score(right: np.ndarray, labels: np.ndarray, metric: str = "top1") -> float:
    """Sum up which rows are right.

    Args:
        right: (n,) bool.
        labels: (n,) int64.
        metric: "top1", the share of rows, or "mean_per_class", the mean of the shares of the classes that occur.
    """
    if metric == "top1":
        return float(right.mean())
    size = np.bincount(labels)
    return float((np.bincount(labels, weights=right)[size > 0] / size[size > 0]).mean())


def _splits(dataset: Dataset) -> dict[str, LabeledSource]:
    names = [which for which in ("train", "validation", "test") if dataset.has(which)]
    return {which: with_classes(dataset.split(which)) for which in names}


def _without_training(dataset: Dataset) -> Sequence[str]:
    source = dataset.split("test")
    return ("zero-shot", "retrieval") if getattr(source, "class_names", None) is not None else ("retrieval",)
