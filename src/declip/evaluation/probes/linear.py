"""The linear probe: logistic regression on frozen features, its penalty chosen by CLIP's coarse-to-fine sweep."""

from collections.abc import Mapping

import numpy as np

from declip.evaluation.probes.data import Labeled, ProbeData, score
from declip.evaluation.probes.logistic import Classifier, LogisticProblem
from declip.evaluation.results import LinearProbeResult, SweepPoint

STEPS_PER_DECADE = 8
GRID: Mapping[int, float] = {step: 10 ** (step / STEPS_PER_DECADE) for step in range(-48, 49)}
"""C from 1e-6 to 1e6 in 96 equal steps of its logarithm, by step; 0 is 1."""
COARSE = 16
"""Steps between the first seven values: two decades."""


def linear_probe(data: ProbeData) -> LinearProbeResult:
    """Choose C on the validation images, fit on these and the training images, measure on the test images.

    This is CLIP's protocol (Radford et al. 2021, appendix A.3): features before the projection, not normalized, no
    augmentation, L-BFGS with at most 1,000 iterations. A fit starts from one that the sweep made before.
    """
    device = data.device
    best, points = sweep(LogisticProblem(data.train.features, data.train.labels, device=device), data)
    both = data.train.join(data.validation)
    problem = LogisticProblem(both.features, both.labels, device=device)
    # A class whose only images are validation images gives the last fit one more row than the sweep's.
    start = best if len(problem.present) == len(best.present) else None
    fitted = problem.fit(best.C, start=start)
    right = is_right(fitted, data.test, data)
    labels = data.test.labels.numpy()
    return LinearProbeResult(
        **data.about,
        top1=score(right, labels, "top1"),
        mean_per_class=score(right, labels, "mean_per_class"),
        C=best.C,
        validation=data.held_out,
        sweep=tuple(points),
        iterations=fitted.iterations,
        converged=fitted.converged,
    )


def sweep(problem: LogisticProblem, data: ProbeData) -> tuple[Classifier, list[SweepPoint]]:
    """Find the C with the best score on the validation images, in 15 fits instead of 97.

    First come C = 1e-6, 1e-4, … 1e6. Then the values half-way to the best one's neighbors are tried, and the step is
    halved until it is an eighth of a decade: CLIP's search. Of equal scores the one with the smaller cross entropy is
    better, which CLIP leaves open. Where the score has one peak as a function of C this finds the peak of all 97
    values; where it has several, or is constant between two values, it may find a lower one.

    Returns:
        The best fit, on the training images alone, and all points that were tried, C ascending.
    """
    fits: dict[int, Classifier] = {}
    points: dict[int, SweepPoint] = {}

    def attempt(step: int) -> None:
        if step in GRID and step not in fits:
            below = [known for known in fits if known < step]
            nearest = max(below) if below else min(fits, default=None)
            fits[step] = problem.fit(GRID[step], start=None if nearest is None else fits[nearest])
            points[step] = _point(fits[step], data)

    def best() -> int:
        return max(sorted(points), key=lambda step: (points[step].score, -np.nan_to_num(points[step].loss, nan=np.inf)))

    for step in range(-48, 49, COARSE):
        attempt(step)
    width = COARSE // 2
    while width:
        peak = best()
        attempt(peak - width)
        attempt(peak + width)
        width //= 2
    return fits[best()], [points[step] for step in sorted(points)]


def is_right(classifier: Classifier, rows: Labeled, data: ProbeData) -> np.ndarray:
    """Whether each row's class is the predicted one, (n,) bool; computed on the data's device."""
    return (classifier.predict(rows.features.to(data.device)).cpu() == rows.labels).numpy()


def _point(classifier: Classifier, data: ProbeData) -> SweepPoint:
    rows = data.validation
    return SweepPoint(
        C=classifier.C,
        score=score(is_right(classifier, rows, data), rows.labels.numpy(), data.metric),
        loss=classifier.cross_entropy(rows.features.to(data.device), rows.labels.to(data.device)),
        iterations=classifier.iterations,
        converged=classifier.converged,
    )
