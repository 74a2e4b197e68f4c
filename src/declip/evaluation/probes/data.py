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
from declip.evaluation.per_class import sample_per_class


@dataclass(frozen=True)
class Labeled:
    """Features (n, width) float32 with their classes (n,) int64, on the CPU."""

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Labeled":
        """Select rows."""
        return Labeled(self.features[rows], self.labels[rows])

    def join(self, other: "Labeled") -> "Labeled":
        """Append the other's rows."""
        return Labeled(torch.cat([self.features, other.features]), torch.cat([self.labels, other.labels]))


@dataclass(frozen=True)
class ProbeData:
    """The splits of a dataset as a model sees them; other fields as in `declip.evaluation.results.ProbeResult`."""

    dataset: str
    classes: int
    train: Labeled  # fitted on
    validation: Labeled  # for choices; never test images
    test: Labeled  # reported
    held_out: str = "validation split"  # origin of `validation`; else "fifth of train"
    features: str = "backbone"
    metric: str = "top1"
    skipped: dict[str, int] | None = None
    device: torch.device | str = "cpu"  # where probes compute

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


def check_probe(dataset: Dataset, task: str) -> None:
    """Check that a dataset can be probed, before anything is encoded."""
    if "train" not in dataset.openers:
        raise UserError(
            f"'{dataset.name}' has no train split, which '{task}' learns from. Use the task 'zero-shot' or 'retrieval'."
        )
    splits = _splits(dataset)
    names = tuple(splits["test"].class_names)
    for which, source in splits.items():
        if tuple(source.class_names) != names:
            raise UserError(
                f"The {which} split of '{dataset.name}' has {len(source.class_names)} class names. A probe needs the "
                f"{len(names)} of the test split, in the same order."
            )
    counts = np.bincount(splits["train"].labels, minlength=len(names))
    if task != "knn" and (counts >= 2).sum() <= len(counts) / 2:
        raise UserError(
            f"'{dataset.name}' has fewer than two training images for {(counts < 2).sum():,} of its {len(counts):,} "
            f"classes: too few to fit on some and choose the penalty on others, as '{task}' does. Use the task 'knn'."
        )


def read_probe_data(dataset: Dataset, cache: FeatureCache, device: torch.device | str = "cpu") -> ProbeData:
    """Encode the splits of a dataset that passes `check_probe`.

    Without a validation split, a fifth of each class's training images, chosen with a fixed seed, takes its place.
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
        chosen = sample_per_class(parts["train"].labels.numpy(), a_fifth)
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


def a_fifth(count: int) -> int:
    """A fifth of a class, to the nearest whole image; one at least where it has two or more."""
    return max(1, round(count / 5)) if count > 1 else 0


def _splits(dataset: Dataset) -> dict[str, LabeledSource]:
    names = [which for which in ("train", "validation", "test") if which in dataset.openers]
    return {which: with_classes(dataset.split(which)) for which in names}
