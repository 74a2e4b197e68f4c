"""Run the trials of a comparison that are left: `python -m declip.comparison.worker FOLDER THREADS`."""

import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from declip.comparison.study import Study, Trial, read_study
from declip.errors import UserError
from declip.evaluation.protocols import Options, evaluate_all
from declip.io.atomic import write_text
from declip.training.assemble import assemble
from declip.training.state import versions
from declip.training.trainer import Trainer

RUNS, RESULT, FAILURE = "runs", "result.json", "failure.txt"
WITHOUT_EVALUATION: dict[str, Any] = {
    "evaluation.zero_shot": (),
    "evaluation.retrieval": (),
    "evaluation.final_zero_shot": (),
    "evaluation.final_retrieval": (),
    "train.evaluate_every": 0,
    "train.patience": None,
}
"""Overrides of every trial: the comparison evaluates after the last step."""


def folder_of(folder: Path, trial: Trial) -> Path:
    """The run folder of a trial."""
    return folder / RUNS / trial.id


def read_trial(folder: Path, trial: Trial) -> dict[str, Any] | None:
    """Read the result of a trial, None before it is finished."""
    with suppress(OSError, ValueError):
        row: dict[str, Any] = json.loads((folder_of(folder, trial) / RESULT).read_text(encoding="utf-8"))
        return row
    return None


def failure(folder: Path, trial: Trial) -> str | None:
    """Read why a trial failed, None if it did not."""
    path = folder_of(folder, trial) / FAILURE
    return path.read_text(encoding="utf-8") if path.is_file() else None


def run_trial(study: Study, trial: Trial, folder: Path) -> bool:
    """Train one trial, resuming where it was stopped, evaluate it, save its scores and delete its weights.

    Returns:
        False after Ctrl-C or SIGTERM.
    """
    overrides = {**WITHOUT_EVALUATION, "data.max_pairs": trial.pairs, "seed": trial.seed}
    run_folder, variant = folder_of(folder, trial), study.variant(trial.variant)
    parts = assemble(variant.resolve(overrides), run_folder, resume=True, quiet=True)
    trainer = Trainer(parts)
    run = trainer.train()
    if not run.finished:
        return False
    results = [
        result.to_dict()
        for name in study.datasets
        for result in evaluate_all(parts.model, name, study.tasks, Options(progress=False))
    ]
    row = {
        **asdict(trial),
        "steps": run.recipe.train.steps,
        "samples": variant.samples,
        "seconds": round(run.seconds, 1),
        "loss": run.metrics[-1]["loss"] if run.metrics else None,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "results": results,
    }
    write_text(run_folder / RESULT, json.dumps(row, indent=1))
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run_folder / name, ignore_errors=True)
    return not trainer.stop.asked


def work(study: Study, folder: Path, trials: Iterable[Trial]) -> bool:
    """Run the trials that are neither finished nor taken by another process; False when asked to stop."""
    (folder / RUNS).mkdir(exist_ok=True)
    return all(_take(study, trial, folder) for trial in trials)


def _take(study: Study, trial: Trial, folder: Path) -> bool:
    """Run a trial unless it is finished or taken. The lock ends with its process, also when that is killed."""
    run_folder = folder_of(folder, trial)
    with suppress(Timeout), FileLock(f"{run_folder}.lock", blocking=False):
        if read_trial(folder, trial) is not None:
            return True
        (run_folder / FAILURE).unlink(missing_ok=True)
        try:
            return run_trial(study, trial, folder)
        except Exception as error:
            run_folder.mkdir(parents=True, exist_ok=True)
            reason = str(error) if isinstance(error, UserError) else traceback.format_exc()
            (run_folder / FAILURE).write_text(reason, encoding="utf-8")
    return True


def _stop_with_parent(parent: int) -> None:
    """Send this process SIGTERM when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Parse the arguments and work; exit with status 130 when asked to stop."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(int(sys.argv[2]))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # between two trials; during one the trainer handles it
    threading.Thread(target=_stop_with_parent, args=(os.getppid(),), daemon=True).start()
    study = read_study(folder)
    assert study is not None, "`runner.run` writes the study before it starts a worker"
    try:
        sys.exit(0 if work(study, folder, study.trials()) else 130)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
