"""The few-shot probe: logistic regression on 1, 2, 4, 8, 16 images a class, over several draws."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from declip.errors import UserError
from declip.evaluation.probes.data import Labeled, ProbeData, by_class, score
from declip.evaluation.probes.linear import is_right, sweep
from declip.evaluation.probes.logistic import LogisticProblem
from declip.evaluation.probes.results import FewShotResult, Shots

SHOTS = (1, 2, 4, 8, 16)
SEEDS = 3
MOST_VALIDATION = 4
"""Validation images a class at most, CoOp's."""


def few_shot_probe(data: ProbeData, shots: Sequence[int] = SHOTS, seeds: int = SEEDS) -> FewShotResult:
    """Fit on a few images a class, drawn by seed, and measure on all test images.

    C is chosen as for CLIP's few-shot linear probe in CoOp (Zhou et al. 2022; `lpclip/linear_probe.py` of its code):
    on min(shots, 4) validation images a class, which are drawn too and not fitted on. The search is `sweep`'s. A
    seed's images for fewer shots are among those for more. A class that has fewer images than shots gives all.

    Args:
        data: The splits of a set, encoded.
        shots: Numbers of images a class.
        seeds: How many draws, numbered from 0.

    Raises:
        UserError: no number of shots, one below 1, or no seed.
    """
    if not shots or min(shots) < 1 or seeds < 1:
        raise UserError(f"shots is {list(shots)} with {seeds} seeds; give one number or more, each 1 or more.")
    return FewShotResult(
        **data.about,  # type: ignore[arg-type]  # each value fits its field
        validation=f"{data.held_out}, min(shots, {MOST_VALIDATION}) images a class",
        runs=tuple(_run(data, count, seeds) for count in sorted(set(shots))),
    )


def draw(rows: Labeled, count: int, seed: int) -> Labeled:
    """Draw up to `count` rows of each class; a smaller count with the same seed draws some of the same rows."""
    generator = np.random.default_rng(seed)
    chosen = [generator.permutation(places)[:count] for places in by_class(rows.labels.numpy())]
    return rows.take(np.sort(np.concatenate(chosen)))


def _run(data: ProbeData, count: int, seeds: int) -> Shots:
    sizes = np.bincount(data.train.labels.numpy(), minlength=data.classes)
    scores, chosen = [], []
    for seed in range(seeds):
        few = replace(
            data,
            train=draw(data.train, count, seed),
            validation=draw(data.validation, min(count, MOST_VALIDATION), seed),
        )
        fitted, _ = sweep(LogisticProblem(few.train.features, few.train.labels, device=data.device), few)
        right = is_right(fitted, data.test, data)
        scores.append(score(right, data.test.labels.numpy(), data.metric))
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
