"""Comparisons whose numbers are known: clip gains 10 points with each doubling, declip is one doubling ahead."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import log2
from typing import Any

from declip.comparison.arms import Arm, baselines_of, ladder_of
from declip.comparison.outcome import Outcome
from declip.comparison.study import Cell, Study, Tuning
from declip.evaluation.results import Recall, RetrievalResult, ZeroShotResult

SIZES = (1000, 2000, 4000, 8000)
MEASURE = "test: zero-shot top-1"
VERSIONS = {"declip": "0.1.0", "torch": "2.6.0"}
AHEAD = {
    "clip": 1,
    "declip": 2,
    "ladder clip": 1,
    "ladder +multi_view": 1.5,
    "ladder +simsiam +masked_language": 1.6,
    "without multi_view": 1.2,
}


def study(names: Sequence[str] = ("clip", "declip"), **changes: Any) -> Study:
    """Recipes at four sizes with three seeds; a step of declip costs twice as much."""
    overrides = {"train.steps": "100", "train.batch_size": "50"}
    plan = Study(
        arms=tuple(Arm(name, name, overrides) for name in names),
        pairs=SIZES,
        seeds=(0, 1, 2),
        steps=100,
        batch=50,
        on=("test",),
        protocols=("zero-shot",),
        budgets=("samples",),
        reference=names[-1],
        machine={"processor": "an abacus"},
    )
    plan = replace(plan, **changes)
    return replace(plan, seconds={arm.name: 0.02 if arm.name == "clip" else 0.04 for arm in plan.arms})


def with_ladder(plan: Study, baselines: bool = True) -> Study:
    """The last recipe taken apart too."""
    last = plan.arms[-1]
    arms = (*plan.arms, *ladder_of(last), *(baselines_of(last) if baselines else []))
    return replace(plan, arms=arms, seconds={arm.name: plan.seconds.get(arm.name, 0.04) for arm in arms})


def tuned(plan: Study) -> Study:
    """With two learning rates tried by every arm, the smaller one kept."""
    tuning = Tuning({"train.lr": (0.001, 0.003)}, "validation", 2000, 100, 1002)
    return replace(plan, tuning=tuning, chosen={arm.name: {"train.lr": 0.001} for arm in plan.arms})


def score(cell: Cell) -> float:
    """By how many pairs and which arm; the seeds lie a point apart."""
    return 0.1 * log2(cell.pairs * AHEAD.get(cell.arm, 1.1) / 500) + 0.01 * (cell.seed - 1)


def outcome(
    plan: Study,
    value: Callable[[Cell], float] = score,
    done: Callable[[Cell], bool] = lambda cell: True,
    retrieval: bool = False,
    **more: Any,
) -> Outcome:
    """Every run that is done, each measured on 400 images of 200 classes."""
    rows = {cell.id: row(plan, cell, value(cell), retrieval) for cell in plan.cells() if done(cell)}
    tries = {cell.id: row(plan, cell, 0.2 - 10 * cell.overrides["train.lr"], False) for cell in plan.tuning_cells()}
    return Outcome(plan, rows, **{"tuning": tries, **more})


def row(plan: Study, cell: Cell, top1: float, retrieval: bool) -> dict[str, Any]:
    """What `cell.py` writes after a run."""
    on = cell.on[0] if cell.on else "test"
    results: list[dict[str, Any]] = [ZeroShotResult(on, 400, 200, top1, min(1.0, top1 + 0.1), top1).to_dict()]
    if retrieval:
        recalls = (Recall(400, 400, top1 + more, 1.0, 1.0, 1 / 400, 5 / 400, 10 / 400, 1.0) for more in (-0.02, 0.02))
        results.append(RetrievalResult(on, 400, 400, *recalls).to_dict())
    return {
        "arm": cell.arm,
        "pairs": cell.pairs,
        "seed": cell.seed,
        "steps": cell.steps,
        "samples": cell.steps * plan.batch,
        "overrides": dict(cell.overrides),
        "seconds": 60.0,
        "device": "cpu",
        "versions": VERSIONS,
        "results": results,
    }
