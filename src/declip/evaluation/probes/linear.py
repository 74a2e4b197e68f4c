"""The linear probe: logistic regression on frozen features of all training images."""

from collections.abc import Mapping

import numpy as np

from declip.evaluation.per_class import score
from declip.evaluation.probes.data import Labeled, ProbeData
from declip.evaluation.probes.logistic import Classifier, LogisticProblem
from declip.evaluation.results import LinearProbeResult, SweepPoint

GRID: Mapping[int, float] = {step: 10 ** (step / 8) for step in range(-48, 49)}
"""C from 1e-6 to 1e6 in 96 equal steps of its logarithm, by step; 0 is 1."""
COARSE = 16  # steps between the first seven values, two decades


def linear_probe(data: ProbeData) -> LinearProbeResult:
    """Select C on the validation images, fit on training and validation images, evaluate on the test images.

    This is CLIP's protocol (Radford et al. 2021, appendix A.3): features before the projection, not normalized, no
    augmentation, L-BFGS with at most 1,000 iterations.
    """
    best, points = sweep(LogisticProblem(data.train.features, data.train.labels, data.device), data)
    both = data.train.join(data.validation)
    problem = LogisticProblem(both.features, both.labels, data.device)
    # A class with validation images only adds a row of weights to the last fit.
    fitted = problem.fit(best.C, start=best if len(problem.present) == len(best.present) else None)
    right, _ = measure(fitted, data.test, data)
    return LinearProbeResult(
        **data.about,
        top1=score(right, data.test.labels.numpy()),
        mean_per_class=score(right, data.test.labels.numpy(), "mean_per_class"),
        majority=float((data.test.labels == both.labels.bincount().argmax()).double().mean()),
        C=best.C,
        validation=data.held_out,
        sweep=tuple(points),
        iterations=fitted.iterations,
        converged=fitted.converged,
    )


def sweep(problem: LogisticProblem, data: ProbeData) -> tuple[Classifier, list[SweepPoint]]:
    """Find the C with the best score on the validation images, in 15 fits instead of 97.

    This is CLIP's search: first C = 1e-6, 1e-4, … 1e6, then the values half-way to the neighbors of the best one, with
    the step halved down to an eighth of a decade. Between equal scores the smaller cross-entropy decides, which CLIP
    leaves open. Returns the best fit, on the training images alone, and all points, C ascending.
    """
    fits: dict[int, Classifier] = {}
    points: dict[int, SweepPoint] = {}

    def attempt(step: int) -> None:
        if step in GRID and step not in fits:
            nearest = max((known for known in fits if known < step), default=min(fits, default=step))
            fit = fits[step] = problem.fit(GRID[step], start=fits.get(nearest))
            right, loss = measure(fit, data.validation, data)
            value = score(right, data.validation.labels.numpy(), data.metric)
            points[step] = SweepPoint(fit.C, value, loss, fit.iterations, fit.converged)

    def best() -> int:
        return max(sorted(points), key=lambda step: (points[step].score, -np.nan_to_num(points[step].loss, nan=np.inf)))

    for step in range(-48, 49, COARSE):
        attempt(step)
    for width in (8, 4, 2, 1):
        peak = best()
        attempt(peak - width)
        attempt(peak + width)
    return fits[best()], [points[step] for step in sorted(points)]


def measure(classifier: Classifier, rows: Labeled, data: ProbeData) -> tuple[np.ndarray, float]:
    """`Classifier.measure`, computed on the data's device."""
    return classifier.measure(rows.features.to(data.device), rows.labels.to(data.device))
