"""One run of a comparison: train, measure, keep the numbers and drop the weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from declip.comparison.study import Cell, Study
from declip.evaluation.protocols import Options, evaluate_all
from declip.io.atomic import atomic_write
from declip.recipe.schema import Recipe
from declip.runs.folder import METRICS, read_rows
from declip.training.setup import versions
from declip.training.trainer import Trainer

CELLS, RESULT = "runs", "result.json"

UNMEASURED: dict[str, Any] = {
    "evaluation.zero_shot": (),
    "evaluation.retrieval": (),
    "evaluation.final_zero_shot": (),
    "evaluation.final_retrieval": (),
    "train.evaluate_every": 0,
}
"""The comparison measures by itself, after the last step."""


def recipe_of(study: Study, cell: Cell, threads: int | None = None) -> Recipe:
    """The resolved recipe of a run."""
    overrides: dict[str, Any] = {
        **UNMEASURED,
        "train.steps": cell.steps,
        "train.batch_size": study.batch,
        "data.max_pairs": cell.pairs,
        "seed": cell.seed,
        **cell.overrides,
    }
    if threads is not None:
        overrides["train.threads"] = threads
    return study.arm(cell.arm).resolve(overrides)


def folder_of(folder: Path, cell: Cell) -> Path:
    """Where a run is."""
    return folder / CELLS / cell.id


def read_cell(folder: Path, cell: Cell) -> dict[str, Any] | None:
    """The result of a run, None while it is not done."""
    path = folder_of(folder, cell) / RESULT
    try:
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row


def steps_done(folder: Path, cell: Cell) -> int:
    """How far a run has come: its last row of metrics."""
    rows = read_rows(folder_of(folder, cell) / METRICS)
    return int(rows[-1]["step"]) if rows else 0


def run_cell(study: Study, cell: Cell, folder: Path, threads: int | None = None) -> bool:
    """Train a run to its end, or go on with it, and measure it.

    Args:
        study: The comparison.
        cell: The run.
        folder: The comparison's folder.
        threads: Of torch; None leaves them.

    Returns:
        Whether to go on with another; False after Ctrl-C or SIGTERM, with a checkpoint to go on from unless the run
        was at its last step.

    Raises:
        UserError: the run failed; see `declip.train`.
    """
    own = folder_of(folder, cell)
    trainer = Trainer(recipe_of(study, cell, threads), own, resume=True, quiet=True)
    run = trainer.train()
    if not run.finished:
        return False
    model = trainer.evaluated_model
    results = [
        result.to_dict()
        for name in (cell.on or study.on)
        for result in evaluate_all(model, name, study.protocols, Options(progress=False))
    ]
    with atomic_write(own / RESULT) as path:
        path.write_text(json.dumps(_row(study, cell, run.metrics, results), indent=1), encoding="utf-8")
    shutil.rmtree(own / "checkpoints", ignore_errors=True)
    shutil.rmtree(own / "tensorboard", ignore_errors=True)
    return not trainer.stop_asked


def _row(study: Study, cell: Cell, metrics: list[dict[str, Any]], results: list[dict[str, Any]]) -> Mapping[str, Any]:
    speeds = sorted(row["samples_per_second"] for row in metrics if row["samples_per_second"])
    return {
        "arm": cell.arm,
        "pairs": cell.pairs,
        "seed": cell.seed,
        "steps": cell.steps,
        "samples": cell.steps * study.batch,
        "overrides": dict(cell.overrides),
        "seconds": round(sum(row["seconds"] for row in metrics), 1),
        "samples_per_second": speeds[len(speeds) // 2] if speeds else None,
        "loss": metrics[-1]["loss"] if metrics else None,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "results": results,
    }
