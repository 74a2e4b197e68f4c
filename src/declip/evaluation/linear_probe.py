"""The linear probe: logistic regression on frozen features of all training images, as in CLIP."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from declip.data.pair import PairSource
from declip.errors import UserError
from declip.evaluation.datasets import Dataset, LabeledSource, with_classes
from declip.evaluation.encode import SourceFeatures
from declip.evaluation.logistic import LogisticFit, LogisticProblem
from declip.evaluation.per_class import sample_per_class, score
from declip.evaluation.results import LinearProbeResult

GRID: Mapping[int, float] = {step: 10 ** (step / 8) for step in range(-48, 49)}
"""C from 1e-6 to 1e6 in 96 equal steps of its logarithm, by step; 0 is 1."""
COARSE = 16  # steps between the first seven values, two decades


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
    """The splits of a dataset as a model sees them."""

    dataset: str
    classes: int
    train: Labeled  # to fit
    validation: Labeled  # to select C
    test: Labeled  # to report
    held_out: str = "validation split"  # or "fifth of train"
    metric: str = "top1"
    skipped: Mapping[str, int] = field(default_factory=dict)
    device: torch.device | str = "cpu"  # where the probe is computed


def check_splits(dataset: Dataset, task: str) -> dict[str, LabeledSource]:
    """Open the splits of a dataset; refuse one without training images, or with other classes in a split."""
    if "train" not in dataset.openers:
        raise UserError(
            f"'{dataset.name}' has no train split, which '{task}' requires. Use the task 'zero-shot' or 'retrieval'."
        )
    splits = _splits(dataset)
    names = tuple(splits["test"].class_names)
    if any(tuple(source.class_names) != names for source in splits.values()):
        raise UserError(f"The splits of '{dataset.name}' need the same {len(names)} class names, in the same order.")
    return splits


def check_probe(dataset: Dataset) -> None:
    """Refuse a dataset that cannot be probed, before anything is encoded."""
    splits = check_splits(dataset, "linear")
    names = splits["test"].class_names
    few = int((np.bincount(splits["train"].labels, minlength=len(names)) < 2).sum())
    if few >= len(names) / 2:
        raise UserError(
            f"'{dataset.name}' has fewer than two training images for {few:,} of its {len(names):,} classes: too few "
            "to split into training and validation images, as 'linear' does. Use the task 'zero-shot'."
        )


def read_probe_data(
    dataset: Dataset, encode: Callable[[PairSource], SourceFeatures], device: torch.device | str = "cpu"
) -> ProbeData:
    """Encode the splits of a dataset that passes `check_probe`."""
    parts: dict[str, Labeled] = {}
    skipped: Counter[str] = Counter()
    splits = _splits(dataset)
    for which, source in splits.items():
        encoded = encode(source)
        labels = np.asarray(source.labels, dtype=np.int64)[encoded.indices]
        parts[which] = Labeled(encoded.images, torch.from_numpy(labels))
        skipped.update(encoded.skipped.counts)
    held_out = "validation split"
    # --- without a validation split: a fifth of each class's training images, with a fixed seed
    if "validation" not in parts:
        held_out = "fifth of train"
        chosen = sample_per_class(parts["train"].labels.numpy(), a_fifth)
        parts["validation"], parts["train"] = parts["train"].take(chosen), parts["train"].take(~chosen)
    return ProbeData(
        dataset.name,
        len(splits["test"].class_names),
        parts["train"],
        parts["validation"],
        parts["test"],
        held_out=held_out,
        metric=dataset.metric,
        skipped=dict(skipped),
        device=device,
    )


def a_fifth(count: int) -> int:
    """A fifth of `count`, rounded, and at least one of two or more."""
    return max(1, round(count / 5)) if count > 1 else 0


def linear_probe(data: ProbeData) -> LinearProbeResult:
    """Select C on the validation images, fit on training and validation images, evaluate on the test images.

    This is CLIP's protocol (Radford et al. 2021, appendix A.3): features before the projection, not normalized, no
    augmentation, L-BFGS with at most 1,000 iterations.
    """
    # --- C, on the training images alone
    best = sweep(LogisticProblem(data.train.features, data.train.labels, data.device), data)
    # --- the last fit, on training and validation images
    both = data.train.join(data.validation)
    problem = LogisticProblem(both.features, both.labels, data.device)
    # A class with validation images only adds a row of weights to the last fit.
    fitted = problem.fit(best.C, start=best if len(problem.present) == len(best.present) else None)
    right, _ = measure(fitted, data.test, data)
    return LinearProbeResult(
        dataset=data.dataset,
        n=len(data.test),
        classes=data.classes,
        train=len(both),
        width=data.test.features.shape[1],
        top1=score(right, data.test.labels.numpy()),
        mean_per_class=score(right, data.test.labels.numpy(), "mean_per_class"),
        majority=float((data.test.labels == both.labels.bincount().argmax()).double().mean()),
        C=best.C,
        validation=data.held_out,
        converged=fitted.converged,
        skipped=data.skipped,
    )


def sweep(problem: LogisticProblem, data: ProbeData) -> LogisticFit:
    """Return the fit on the training images with the best score on the validation images, in 15 fits instead of 97.

    This is CLIP's search. Between equal scores the smaller cross-entropy decides, which CLIP leaves open, then the
    smaller C.
    """
    fits: dict[int, LogisticFit] = {}
    scores: dict[int, tuple[float, float]] = {}

    def attempt(step: int) -> None:
        if step in GRID and step not in fits:
            nearest = max((known for known in fits if known < step), default=min(fits, default=step))
            fits[step] = problem.fit(GRID[step], start=fits.get(nearest))
            right, loss = measure(fits[step], data.validation, data)
            value = score(right, data.validation.labels.numpy(), data.metric)
            scores[step] = value, -np.nan_to_num(loss, nan=np.inf)

    def best() -> int:
        return max(sorted(scores), key=scores.__getitem__)

    # First C = 1e-6, 1e-4, … 1e6, then half-way to the neighbors of the best one, down to an eighth of a decade.
    for step in range(-48, 49, COARSE):
        attempt(step)
    for width in (8, 4, 2, 1):
        peak = best()
        attempt(peak - width)
        attempt(peak + width)
    return fits[best()]


def measure(classifier: LogisticFit, rows: Labeled, data: ProbeData) -> tuple[np.ndarray, float]:
    """`LogisticFit.measure`, computed on the data's device."""
    return classifier.measure(rows.features.to(data.device), rows.labels.to(data.device))


def _splits(dataset: Dataset) -> dict[str, LabeledSource]:
    names = [which for which in ("train", "validation", "test") if which in dataset.openers]
    return {which: with_classes(dataset.split(which)) for which in names}
