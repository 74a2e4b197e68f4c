"""A process that takes trials of a comparison until none is left: `python -m declip.comparison.worker FOLDER PART N`.

A trial trains, measures, keeps its numbers and drops its weights.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from declip.comparison.study import Study, Trial, read_study
from declip.errors import UserError
from declip.evaluation.protocols import Options, evaluate_all
from declip.io.atomic import atomic_write
from declip.recipe.schema import Recipe
from declip.runs.folder import METRICS, read_rows
from declip.training.setup import versions
from declip.training.trainer import Trainer

TRIALS, RESULT, FAILURE = "runs", "result.json", "failure.txt"
SWEEP, COMPARISON = "sweep", "comparison"
"""The two parts of a study."""

UNMEASURED: dict[str, Any] = {
    "evaluation.zero_shot": (),
    "evaluation.retrieval": (),
    "evaluation.final_zero_shot": (),
    "evaluation.final_retrieval": (),
    "train.evaluate_every": 0,
}
"""The comparison measures by itself, after the last step."""


def trials_of(study: Study, part: str) -> list[Trial]:
    """The trials of a part of the study."""
    return study.sweep_trials() if part == SWEEP else study.trials()


def folder_of(folder: Path, trial: Trial) -> Path:
    """The run folder of a trial."""
    return folder / TRIALS / trial.id


def read_trial(folder: Path, trial: Trial) -> dict[str, Any] | None:
    """Read the result of a trial, None while it is not done."""
    try:
        row: dict[str, Any] = json.loads((folder_of(folder, trial) / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return row


def failure(folder: Path, trial: Trial) -> str | None:
    """Read why a trial failed, None when it did not."""
    path = folder_of(folder, trial) / FAILURE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def steps_done(folder: Path, trial: Trial) -> int:
    """The last step that a trial has logged."""
    rows = read_rows(folder_of(folder, trial) / METRICS)
    return int(rows[-1]["step"]) if rows else 0


def recipe_of(study: Study, trial: Trial, threads: int | None = None) -> Recipe:
    """Resolve the recipe of a trial."""
    overrides: dict[str, Any] = {
        **UNMEASURED,
        "train.steps": trial.steps,
        "train.batch_size": study.batch_size,
        "data.max_pairs": trial.pairs,
        "seed": trial.seed,
        **trial.overrides,
    }
    if threads is not None:
        torch.set_num_threads(threads)
    return study.variant(trial.variant).resolve(overrides)


def run_trial(study: Study, trial: Trial, folder: Path, threads: int | None = None) -> bool:
    """Train a trial to its end, resuming where it was stopped, and measure it.

    Returns:
        Whether to continue with another trial; False after Ctrl-C or SIGTERM.
    """
    own = folder_of(folder, trial)
    trainer = Trainer(recipe_of(study, trial, threads), own, resume=True, quiet=True)
    run = trainer.train()
    if not run.finished:
        return False
    results = [
        result.to_dict()
        for name in trial.datasets or study.datasets
        for result in evaluate_all(trainer.evaluated_model, name, study.tasks, Options(progress=False))
    ]
    with atomic_write(own / RESULT) as path:
        path.write_text(json.dumps(_row(study, trial, run.metrics, results), indent=1), encoding="utf-8")
    shutil.rmtree(own / "checkpoints", ignore_errors=True)
    shutil.rmtree(own / "tensorboard", ignore_errors=True)
    return not trainer.stop.asked


def _row(study: Study, trial: Trial, metrics: list[dict[str, Any]], results: list[dict[str, Any]]) -> Mapping[str, Any]:
    speeds = sorted(row["samples_per_second"] for row in metrics if row["samples_per_second"])
    return {
        "variant": trial.variant,
        "pairs": trial.pairs,
        "seed": trial.seed,
        "steps": trial.steps,
        "samples": trial.steps * study.batch_size,
        "overrides": dict(trial.overrides),
        "seconds": round(sum(row["seconds"] for row in metrics), 1),
        "samples_per_second": speeds[len(speeds) // 2] if speeds else None,
        "loss": metrics[-1]["loss"] if metrics else None,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "results": results,
    }


def work(folder: Path, part: str, threads: int | None = None) -> bool:
    """Run every trial that is neither done nor taken by another process; False when asked to stop."""
    study = read_study(folder)
    assert study is not None, "the comparison writes its study before it starts a worker"
    (folder / TRIALS).mkdir(exist_ok=True)
    return all(_take(study, trial, folder, threads) for trial in trials_of(study, part))


def _take(study: Study, trial: Trial, folder: Path, threads: int | None) -> bool:
    """Run a trial unless it is done or taken. The lock ends with its process, so a killed one leaves none behind."""
    own = folder_of(folder, trial)
    try:
        with FileLock(f"{own}.lock", blocking=False):
            if read_trial(folder, trial) is not None:
                return True
            (own / FAILURE).unlink(missing_ok=True)
            try:
                return run_trial(study, trial, folder, threads)
            except Exception as error:
                own.mkdir(parents=True, exist_ok=True)
                reason = str(error) if isinstance(error, UserError) else traceback.format_exc()
                (own / FAILURE).write_text(reason, encoding="utf-8")
    except Timeout:
        pass
    return True


def _stop_with_parent(parent: int) -> None:
    """Stop this process politely when the one that started it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Read the arguments, work, and end with status 130 when asked to stop."""
    folder, part, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # between two trials; during one the trainer's own counts
    threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
    try:
        finished = work(folder, part, threads)
    except KeyboardInterrupt:
        finished = False
    sys.exit(0 if finished else 130)


if __name__ == "__main__":
    main()
