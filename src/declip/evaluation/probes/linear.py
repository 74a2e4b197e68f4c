"""Linear probes: logistic regression on frozen features of all training images or of a few per class."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from declip.errors import UserError
from declip.evaluation.per_class import sample_per_class, score
from declip.evaluation.probes.data import Labeled, ProbeData
from declip.evaluation.probes.logistic import Classifier, LogisticProblem
from declip.evaluation.results import FewShotResult, LinearProbeResult, Shots, SweepPoint

GRID: Mapping[int, float] = {step: 10 ** (step / 8) for step in range(-48, 49)}
"""C from 1e-6 to 1e6 in 96 equal steps of its logarithm, by step; 0 is 1."""
COARSE = 16  # steps between the first seven values: two decades

SHOTS = (1, 2, 4, 8, 16)
SEEDS = 3
MOST_VALIDATION = 4  # images per class, CoOp's


def linear_probe(data: ProbeData) -> LinearProbeResult:
    """Choose C on the validation images, fit on these and the training images, measure on the test images.

    This is CLIP's protocol (Radford et al. 2021, appendix A.3): features before the projection, not normalized, no
    augmentation, L-BFGS with at most 1,000 iterations.
    """
    best, points = sweep(LogisticProblem(data.train.features, data.train.labels, device=data.device), data)
    both = data.train.join(data.validation)
    problem = LogisticProblem(both.features, both.labels, device=data.device)
    # A class whose only images are validation images gives the last fit one more row than the sweep's.
    start = best if len(problem.present) == len(best.present) else None
    fitted = problem.fit(best.C, start=start)
    right, labels = measure(fitted, data.test, data)[0], data.test.labels.numpy()
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
    better, which CLIP leaves open. Where the score has several peaks as a function of C, it may miss the highest.

    Returns:
        The best fit, on the training images alone, and all points that were tried, C ascending.
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
    width = COARSE // 2
    while width:
        peak = best()
        attempt(peak - width)
        attempt(peak + width)
        width //= 2
    return fits[best()], [points[step] for step in sorted(points)]


def few_shot_probe(data: ProbeData, shots: Sequence[int] = SHOTS, seeds: int = SEEDS) -> FewShotResult:
    """Fit on a few images per class, sampled by seed, and measure on all test images.

    C is chosen by `sweep` as for CLIP's few-shot linear probe in CoOp (Zhou et al. 2022; its `lpclip/linear_probe.py`):
    on min(shots, 4) validation images per class, which are sampled too and not fitted on. A seed's images for fewer
    shots are among those for more. A class that has fewer images than shots gives all.
    """
    if not shots or min(shots) < 1 or seeds < 1:
        raise UserError(f"shots is {list(shots)} with {seeds} seeds; give one number or more, each 1 or more.")
    return FewShotResult(
        **data.about,
        validation=f"{data.held_out}, min(shots, {MOST_VALIDATION}) images a class",
        runs=tuple(_run(data, count, seeds) for count in sorted(set(shots))),
    )


def sample(rows: Labeled, count: int, seed: int) -> Labeled:
    """Sample up to `count` rows of each class."""
    return rows.take(sample_per_class(rows.labels.numpy(), lambda size: count, seed))


def _run(data: ProbeData, count: int, seeds: int) -> Shots:
    sizes = np.bincount(data.train.labels.numpy(), minlength=data.classes)
    scores, chosen = [], []
    for seed in range(seeds):
        train = sample(data.train, count, seed)
        few = replace(data, train=train, validation=sample(data.validation, min(count, MOST_VALIDATION), seed))
        fitted, _ = sweep(LogisticProblem(train.features, train.labels, device=data.device), few)
        scores.append(score(measure(fitted, data.test, data)[0], data.test.labels.numpy(), data.metric))
        chosen.append(fitted.C)
    return Shots(
        shots=count,
        mean=float(np.mean(scores)),
        std=float(np.std(scores, ddof=1)) if seeds > 1 else 0.0,
        scores=tuple(scores),
        C=tuple(chosen),
        images=int(np.minimum(sizes, count).sum()),
        short=int((sizes < count).sum()),
    )


def measure(classifier: Classifier, rows: Labeled, data: ProbeData) -> tuple[np.ndarray, float]:
    """`Classifier.measure`, computed on the data's device."""
    return classifier.measure(rows.features.to(data.device), rows.labels.to(data.device))
