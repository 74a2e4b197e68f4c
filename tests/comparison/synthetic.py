"""Comparisons with known numbers: clip gains 10 points per doubling, and declip needs half as many pairs."""

from dataclasses import asdict, replace
from math import log2

from declip.comparison.outcome import Outcome
from declip.comparison.study import Study, Variant
from declip.evaluation.results import RecallAtK, RetrievalResult, ZeroShotResult

SIZES = (1000, 2000, 4000, 8000)
MEASURE = "test: zero-shot top-1"
VERSIONS = {"declip": "0.1.0", "torch": "2.6.0"}
AHEAD = {"clip": 1, "declip": 2}


def study(names=("clip", "declip"), **changes):
    """Recipes at four sizes with three seeds; a run of declip takes twice as long."""
    overrides = {"train.steps": "100", "train.batch_size": "50"}
    variants = tuple(Variant.of(name, overrides) for name in names)
    return replace(Study(variants, SIZES, (0, 1, 2), ("test",), ("zero-shot",)), **changes)


def score(trial):
    """By how many pairs and which variant; the seeds lie a point apart."""
    return 0.1 * log2(trial.pairs * AHEAD.get(trial.variant, 1.1) / 500) + 0.01 * (trial.seed - 1)


def outcome(plan, value=score, done=lambda trial: True, retrieval=False, **more):
    """Every finished run, each evaluated on 400 images of 200 classes."""
    rows = {
        trial.id: row(plan, trial, value(trial), retrieval)
        for trial in plan.trials()
        if done(trial)
    }
    return Outcome(plan, rows, **more)


def row(plan, trial, top1, retrieval):
    results = [ZeroShotResult("test", 400, 200, top1, min(1.0, top1 + 0.1), top1).to_dict()]
    if retrieval:
        recalls = (
            RecallAtK(400, 400, top1 + more, 1.0, 1.0, 1 / 400, 5 / 400, 10 / 400, 1.0)
            for more in (-0.02, 0.02)
        )
        results.append(RetrievalResult("test", 400, 400, *recalls).to_dict())
    cost = {
        "seconds": 60.0 if trial.variant == "clip" else 120.0,
        "device": "cpu",
        "versions": VERSIONS,
    }
    return {**asdict(trial), **cost, "results": results}
