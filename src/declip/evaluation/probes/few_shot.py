"""The few-shot probe: logistic regression on 1, 2, 4, 8, 16 images per class, over several samples."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from declip.errors import UserError
from declip.evaluation.probes.data import Labeled, ProbeData, by_class, score
from declip.evaluation.probes.linear import is_right, sweep
from declip.evaluation.probes.logistic import LogisticProblem
from declip.evaluation.results import FewShotResult, Shots

SHOTS = (1, 2, 4, 8, 16)
SEEDS = 3
MOST_VALIDATION = 4
"""Largest number of validation images per class, CoOp's."""


def few_shot_probe(data: ProbeData, shots: Sequence[int] = SHOTS, seeds: int = SEEDS) -> FewShotResult:
    """Fit on a few images per class, sampled by seed, and measure on all test images.

    C is chosen as for CLIP's few-shot linear probe in CoOp (Zhou et al. 2022; `lpclip/linear_probe.py` of its code):
    on min(shots, 4) validation images per class, which are sampled too and not fitted on. The search is `sweep`'s. A
    seed's images for fewer shots are among those for more. A class that has fewer images than shots gives all.
    """
    if not shots or min(shots) < 1 or seeds < 1:
        raise UserError(f"shots is {list(shots)} with {seeds} seeds; give one number or more, each 1 or more.")
    return FewShotResult(
        **data.about,
        validation=f"{data.held_out}, min(shots, {MOST_VALIDATION}) images a class",
        runs=tuple(_run(data, count, seeds) for count in sorted(set(shots))),
    )


def sample(rows: Labeled, count: int, seed: int) -> Labeled:
    """Sample up to `count` rows of each class; a smaller count with the same seed gives some of the same rows."""
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(members)[:count] for members in by_class(rows.labels.numpy())]
    return rows.take(np.sort(np.concatenate(chosen)))


def _run(data: ProbeData, count: int, seeds: int) -> Shots:
    sizes = np.bincount(data.train.labels.numpy(), minlength=data.classes)
    scores, chosen = [], []
    for seed in range(seeds):
        train = sample(data.train, count, seed)
        few = replace(data, train=train, validation=sample(data.validation, min(count, MOST_VALIDATION), seed))
        fitted, _ = sweep(LogisticProblem(train.features, train.labels, device=data.device), few)
        scores.append(score(is_right(fitted, data.test, data), data.test.labels.numpy(), data.metric))
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
