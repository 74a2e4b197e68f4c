"""Run a comparison: the trials in worker processes, then collect the results."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from declip.comparison import worker
from declip.comparison.outcome import Outcome, read_outcome
from declip.comparison.study import STUDY, Study, extended, read_study, write_study
from declip.errors import UserError
from declip.io.atomic import write_text
from declip.io.progress import progress_bar
from declip.models.device import pick_device
from declip.recipe.schema import Recipe

RESULTS = "results.json"
MOST_JOBS = 8
POLL_SECONDS = 1.0  # between two looks at the progress of the trials


def run(study: Study, out: str | Path, jobs: int | None = None, quiet: bool = False) -> Outcome:
    """Run a comparison in a folder; called again after a stop, it continues.

    Every trial trains on `pairs` pairs that its seed selects (a larger number includes those of a smaller one), for
    the steps of its recipe, and is then evaluated.

    Args:
        out: Folder of the comparison. Several processes may share it: each takes trials that are free.
        jobs: Number of processes; with 1 the trials run in this one. By default one per core (per OMP_NUM_THREADS
            cores if that is set), at most 8, or one on an accelerator.

    Returns:
        The outcome, which is also in results.json; `complete` is False after Ctrl-C.
    """
    folder = Path(out).expanduser()
    earlier = read_study(folder)
    (study if earlier is None else extended(study, earlier, folder)).check()
    study = open_folder(study, folder)
    _run_trials(study, folder, *_processes(study.variants[0].resolve(), jobs), quiet)
    outcome = read_outcome(folder)
    write_text(folder / RESULTS, json.dumps(outcome.to_dict(), indent=1))
    return outcome


def open_folder(study: Study, folder: Path) -> Study:
    """Create the folder of a study, or add the study to the comparison in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create '{folder}': {error.strerror}. Choose another folder with --out.") from error
    if not (folder / STUDY).exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise UserError(f"'{folder}' is not empty and has no comparison. Choose another folder with --out.")
    with FileLock(folder / ".plan.lock"):
        earlier = read_study(folder)
        study = study if earlier is None else extended(study, earlier, folder)
        study.check_names()
        write_study(study, folder)
    return study


def _processes(recipe: Recipe, jobs: int | None) -> tuple[int, int]:
    """The number of worker processes, and of threads in each, which OMP_NUM_THREADS sets."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else None
    if jobs is None:
        on_cpu = pick_device(recipe.train.device).type == "cpu"
        jobs = max(1, min(cores // (threads or 1), MOST_JOBS)) if on_cpu else 1
    return jobs, threads or max(1, cores // jobs)


def _run_trials(study: Study, folder: Path, jobs: int, threads: int, quiet: bool) -> None:
    """Run the trials that are left, in workers or in this process, until they end or Ctrl-C."""
    left = [trial for trial in study.trials() if worker.read_trial(folder, trial) is None]
    for trial in left:
        (worker.folder_of(folder, trial) / worker.FAILURE).unlink(missing_ok=True)
    if jobs == 1 or not left:
        with _bar(quiet) as bar:
            worker.work(study, folder, bar.track(study.trials(), description="runs"))
        return
    # Not by multiprocessing, which would run the user's script again in every worker.
    command = [sys.executable, "-m", "declip.comparison.worker", str(folder), str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    logs = [folder / f"worker{number}.log" for number in range(min(jobs, len(left)))]
    processes = []
    for path in logs:
        with path.open("w", encoding="utf-8") as file:
            # In a new session, so that Ctrl-C reaches only this process, which then asks each worker once. Asked
            # twice they would stop without saving.
            options: dict[str, Any] = {"env": environment, "stdout": file, "stderr": file, "start_new_session": True}
            processes.append(subprocess.Popen(command, **options))
    try:
        _watch(study, folder, processes, quiet)
    except KeyboardInterrupt:
        Console(stderr=True, quiet=quiet).print("Stopping: every trial saves a checkpoint …")
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        return
    for process, path in zip(processes, logs, strict=True):
        if process.returncode not in (0, 130):
            lines = path.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
            raise UserError(
                f"A worker process ended with status {process.returncode}: {lines[-1]}. Its log is '{path}'. Run the "
                "same command to continue; fewer --jobs need less memory."
            )


def _watch(study: Study, folder: Path, processes: Sequence[subprocess.Popen[bytes]], quiet: bool) -> None:
    """Show how many trials have ended, until the workers end."""
    trials = study.trials()
    ends = [worker.folder_of(folder, trial) / name for trial in trials for name in (worker.RESULT, worker.FAILURE)]
    with _bar(quiet) as bar:
        task = bar.add_task("runs", total=len(trials))
        while any(process.poll() is None for process in processes):
            bar.update(task, completed=sum(path.is_file() for path in ends))
            time.sleep(POLL_SECONDS)


def _bar(quiet: bool) -> Progress:
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return progress_bar(*columns, shown=not quiet)
