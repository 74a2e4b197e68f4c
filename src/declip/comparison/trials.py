"""The trials of a comparison: train, evaluate and save one at a time, shared by any number of processes.

`python -m declip.comparison.trials FOLDER` runs those that are free.
"""

import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
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
from declip.training.parts import versions
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
    """Train or resume a trial, evaluate it, save its scores and delete its weights; False after Ctrl-C or SIGTERM."""
    # --- train
    run_folder, variant = folder_of(folder, trial), study.variant(trial.variant)
    overrides = {"train.steps": variant.steps, "data.max_pairs": trial.pairs, "seed": trial.seed}
    overrides |= WITHOUT_EVALUATION
    parts = assemble(variant.resolve(overrides), run_folder, resume=True, quiet=True)
    trainer = Trainer(parts)
    run = trainer.train()
    if not run.finished:
        return False
    # --- evaluate
    options = Options(shots=study.shots, progress=False)
    results = [
        result.to_dict() for name in study.datasets for result in evaluate_all(parts.model, name, study.tasks, options)
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
    # --- a hundred finished runs would fill a disk
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run_folder / name, ignore_errors=True)
    return not trainer.stop.asked


def work(study: Study, folder: Path, trials: Iterable[Trial], advance: Callable[[], object] = lambda: None) -> None:
    """Run the trials that are not finished, first those that no other process has taken, until Ctrl-C."""
    (folder / RUNS).mkdir(exist_ok=True)
    taken: list[Trial] = []
    # A process that was killed released its lock, so this process continues its trial.
    for wait, some in ((False, trials), (True, taken)):
        for trial in some:
            try:
                if not _run(study, trial, folder, wait):
                    return
                advance()  # it has ended, here or in another process
            except Timeout:
                taken.append(trial)


def _run(study: Study, trial: Trial, folder: Path, wait: bool) -> bool:
    """Run a trial unless it is finished or failed elsewhere; raise `Timeout` if another process has it."""
    run_folder = folder_of(folder, trial)
    # The lock ends with its process, also when that is killed.
    with FileLock(f"{run_folder}.lock", timeout=-1 if wait else 0):
        if read_trial(folder, trial) is not None or failure(folder, trial) is not None:
            return True
        try:
            return run_trial(study, trial, folder)
        except Exception as error:
            run_folder.mkdir(parents=True, exist_ok=True)
            reason = str(error) if isinstance(error, UserError) else traceback.format_exc()
            (run_folder / FAILURE).write_text(reason, encoding="utf-8")
    return True


def _stop_with_parent() -> None:
    """Send this process SIGTERM when the parent has ended."""
    os.read(0, 1)  # the parent holds the other end of standard input
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    whole = read_study(Path(sys.argv[1]))
    assert whole is not None, "`runner.run` writes the study first"
    work(whole, Path(sys.argv[1]), whole.trials())
