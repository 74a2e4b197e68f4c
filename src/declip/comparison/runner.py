"""Run a comparison: time the steps, run the trials in worker processes, collect the results."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from declip.comparison import worker
from declip.comparison.outcome import RESULTS, Outcome, read_outcome
from declip.comparison.study import STUDY, Study, extended, read_study, write_study
from declip.comparison.worker import WITHOUT_EVALUATION, read_trial
from declip.errors import UserError
from declip.io.atomic import write_text
from declip.io.progress import progress_bar, status
from declip.models.device import pick_device
from declip.recipe.schema import Recipe
from declip.training.assemble import assemble
from declip.training.estimate import step_seconds
from declip.training.state import versions

MOST_JOBS = 8
POLL_SECONDS = 1.0  # between two looks at the progress of the trials
ROUNDS, WARM, TIMED = 3, 3, 8  # rounds of timing, and steps per round: warm-up fills caches and chooses kernels


def run(study: Study, out: str | Path, jobs: int | None = None, quiet: bool = False) -> Outcome:
    """Run a comparison in a folder; called again after a stop, it continues.

    Every trial trains on `pairs` pairs that its seed selects (a larger number includes those of a smaller one) and is
    then evaluated. At equal samples every recipe takes `train.steps` steps; at equal compute, as many as fit into the
    time of the reference, by the seconds per step that were measured before the first trial.

    Args:
        out: Folder of the comparison. Several processes may share it: each takes trials that are free.
        jobs: Worker processes; 0 runs the trials in this one. By default one per core (per OMP_NUM_THREADS cores if
            that is set), at most 8, or one on an accelerator.

    Returns:
        The outcome, which is also in results.json; `complete` is False after Ctrl-C.
    """
    folder = Path(out).expanduser()
    earlier = read_study(folder)
    (study if earlier is None else extended(study, earlier, folder)).check()
    study = open_folder(study, folder)
    jobs, threads = _processes(study.variants[0].resolve(), jobs)
    with FileLock(folder / ".plan.lock"):
        study = _timed(read_study(folder) or study, folder, threads, quiet)
    _run_trials(study, folder, jobs, threads, quiet)
    with FileLock(folder / ".plan.lock"):  # another process may be timing a recipe that joined
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
        if earlier is None:  # the reference stays when recipes are added later
            study = replace(study, compute_budget_of=study.reference)
        else:
            study = extended(study, earlier, folder)
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
    return jobs, threads or max(1, cores // (jobs or 1))


def seconds_per_step(recipes: Mapping[str, Recipe], threads: int) -> dict[str, float]:
    """Time a step of every recipe, loading included: the median over all rounds, with `threads` threads.

    The recipes alternate, so that a machine that slows down does so for all of them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times: dict[str, list[float]] = {name: [] for name in recipes}
    try:
        for name in [*recipes] * ROUNDS:
            with TemporaryDirectory() as folder:
                times[name] += step_seconds(assemble(recipes[name], Path(folder) / "run", quiet=True), WARM, TIMED)
    finally:
        torch.set_num_threads(before)
    return {name: median(values) for name, values in times.items()}


def _timed(study: Study, folder: Path, threads: int, quiet: bool) -> Study:
    """Time new variants alternating with the reference, and scale them to the time that it had before."""
    new = [variant for variant in study.variants if variant.name not in study.seconds]
    if not new:
        return study
    overrides = {**WITHOUT_EVALUATION, "train.batch_size": study.batch_size, "data.max_pairs": study.pairs[0]}
    known = study.variant(study.reference)
    timed = new if known in new else [known, *new]
    with status(f"Timing a step of {', '.join(variant.name for variant in new)}", not quiet):
        seconds = seconds_per_step({each.name: each.resolve(overrides) for each in timed}, threads)
    scale = study.seconds.get(known.name, seconds[known.name]) / seconds[known.name]
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"processor": platform.processor() or platform.machine(), "accelerator": accelerator}
    machine |= {**versions(), "threads": str(threads)}
    every = {**study.seconds, **{variant.name: seconds[variant.name] * scale for variant in new}}
    study = replace(study, seconds=every, machine=study.machine or machine)
    write_study(study, folder)
    return study


def _run_trials(study: Study, folder: Path, jobs: int, threads: int, quiet: bool) -> None:
    """Run the trials that are left, in `jobs` workers or in this process, until they end or Ctrl-C."""
    left = [trial for trial in study.trials() if read_trial(folder, trial) is None]
    for trial in left:
        (worker.folder_of(folder, trial) / worker.FAILURE).unlink(missing_ok=True)
    if not left:
        return
    if jobs == 0:
        worker.work(folder, threads)
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
        watch(study, folder, processes, quiet)
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


def watch(study: Study, folder: Path, processes: Sequence[subprocess.Popen[bytes]], quiet: bool) -> None:
    """Show the progress of all trials, weighted by their seconds per step, until the workers end."""
    trials = study.trials()
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[runs]} runs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )

    def seconds_done() -> float:
        return sum(worker.steps_done(folder, trial) * study.seconds[trial.variant] for trial in trials)

    with progress_bar(*columns, shown=not quiet, speed_estimate_period=300, refresh_per_second=2) as bar:
        total = sum(trial.steps * study.seconds[trial.variant] for trial in trials)
        task = bar.add_task("comparison", total=total, completed=int(seconds_done()), runs="")
        alive = True
        while alive:
            alive = any(process.poll() is None for process in processes)
            runs = sum(worker.has_ended(folder, trial) for trial in trials)
            bar.update(task, completed=seconds_done(), runs=f"{runs}/{len(trials)}")
            if alive:
                time.sleep(POLL_SECONDS)
