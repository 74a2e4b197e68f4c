"""Data of a probe: labeled features of three splits."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from declip.data.pair import PairSource
from declip.errors import UserError, unknown
from declip.evaluation.datasets import Dataset, LabeledSource, with_classes
from declip.evaluation.encode import Encoder, SourceFeatures
from declip.evaluation.per_class import sample_per_class

FeatureKind = Literal["backbone", "embedding"]


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
    train: Labeled  # to fit
    validation: Labeled  # to select hyperparameters
    test: Labeled  # to report
    held_out: str = "validation split"  # or "fifth of train"
    features: str = "backbone"
    metric: str = "top1"
    skipped: dict[str, int] | None = None
    device: torch.device | str = "cpu"  # where probes are computed

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


def encoder_of(model: Encoder, kind: str) -> Callable[[Tensor], Tensor]:
    """Return the function from normalized pixels (n, 3, S, S) to the features (n, width) of probes.

    "backbone" is `model.encode_backbone`, the pooled feature before the projection, not normalized, as in CLIP (Radford
    et al. 2021, appendix A.3); "embedding" is `model.encode_image`.
    """
    methods = {"backbone": "encode_backbone", "embedding": "encode_image"}
    if kind not in methods:
        raise unknown("kind of features", kind, methods)
    if not hasattr(model, methods[kind]):
        raise UserError(
            f"{type(model).__name__} has no method `{methods[kind]}` from pixels to features. Add it, or probe the "
            "projected features with features='embedding'."
        )
    return getattr(model, methods[kind])


def check_probe(dataset: Dataset, task: str) -> None:
    """Refuse a dataset that cannot be probed, before anything is encoded."""
    if "train" not in dataset.openers:
        raise UserError(
            f"'{dataset.name}' has no train split, which '{task}' requires. Use the task 'zero-shot' or 'retrieval'."
        )
    splits = _splits(dataset)
    names = tuple(splits["test"].class_names)
    if any(tuple(source.class_names) != names for source in splits.values()):
        raise UserError(f"The splits of '{dataset.name}' need the same {len(names)} class names, in the same order.")
    few = int((np.bincount(splits["train"].labels, minlength=len(names)) < 2).sum())
    if task != "knn" and few >= len(names) / 2:
        raise UserError(
            f"'{dataset.name}' has fewer than two training images for {few:,} of its {len(names):,} classes: too few "
            f"to split into training and validation images, as '{task}' does. Use the task 'knn'."
        )


def read_probe_data(
    dataset: Dataset,
    encode: Callable[[PairSource], SourceFeatures],
    features: str = "backbone",
    device: torch.device | str = "cpu",
) -> ProbeData:
    """Encode the splits of a dataset that passes `check_probe`.

    Without a validation split, a fifth of each class's training images, sampled with a fixed seed, is used.
    """
    parts: dict[str, Labeled] = {}
    skipped: Counter[str] = Counter()
    splits = _splits(dataset)
    for which, source in splits.items():
        encoded = encode(source)
        labels = np.asarray(source.labels, dtype=np.int64)[encoded.indices]
        parts[which] = Labeled(encoded.images, torch.from_numpy(labels))
        skipped.update(encoded.skipped.counts)
    held_out = "validation split"
    if "validation" not in parts:
        held_out = "fifth of train"
        chosen = sample_per_class(parts["train"].labels.numpy(), a_fifth)
        parts["validation"], parts["train"] = parts["train"].take(chosen), parts["train"].take(~chosen)
    classes, about = len(splits["test"].class_names), (held_out, features, dataset.metric, dict(skipped), device)
    return ProbeData(dataset.name, classes, parts["train"], parts["validation"], parts["test"], *about)


def a_fifth(count: int) -> int:
    """A fifth of `count`, rounded, and at least one of two or more."""
    return max(1, round(count / 5)) if count > 1 else 0


def _splits(dataset: Dataset) -> dict[str, LabeledSource]:
    names = [which for which in ("train", "validation", "test") if which in dataset.openers]
    return {which: with_classes(dataset.split(which)) for which in names}
