"""Comparing recipes: plan, time, tune, run, and tell what came out."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from declip.comparison.arms import Arm, arms_of
from declip.comparison.cost import seconds_per_step
from declip.comparison.outcome import Outcome, read_outcome, tuning_score, write_results
from declip.comparison.study import BUDGETS, STUDY, Study, Tuning, extended, read_study, write_study
from declip.comparison.trial import UNMEASURED, read_cell, steps_done
from declip.comparison.worker import RUNS, TUNING, cells_of, failure
from declip.data.sources.mixture import Mixture
from declip.errors import UserError, unknown
from declip.evaluation.protocols import PROTOCOLS
from declip.io.progress import on_terminal, print_line, progress_bar, status
from declip.recipe.schema import Recipe
from declip.training.setup import open_training_source

MOST_JOBS = 8
LOOK_EVERY = 1.0
"""Seconds between two looks at how far the runs are."""


def compare(
    recipes: Sequence[str],
    pairs: Sequence[int],
    seeds: int | Sequence[int] = 3,
    *,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    on: Sequence[str] = (),
    protocols: Sequence[str] = ("zero-shot",),
    budgets: Sequence[str] = BUDGETS,
    reference: str | None = None,
    ladder: bool = False,
    baselines: bool = False,
    tune: Mapping[str, Sequence[Any]] | None = None,
    tune_on: str | None = None,
    tune_pairs: int | None = None,
    tune_steps: int | None = None,
    jobs: int | None = None,
    quiet: bool = False,
) -> Outcome:
    """Compare recipes at several numbers of distinct pairs; killed and started again, it goes on.

    Every run learns from `pairs` pairs that its seed chooses (a larger number keeps all that a smaller one chose) and
    is then measured. At equal samples every recipe takes `train.steps` steps; at equal compute, as many as fit into
    the time of the reference recipe's, by the seconds a step that were measured in turns before the first run.

    Args:
        recipes: Shipped recipes' names or YAML files.
        pairs: Numbers of distinct pairs.
        seeds: How many, counted from 0, or which.
        out: Folder of the comparison. Several processes may share it: each takes runs that are free.
        overrides: Dotted keys and values, for every recipe.
        on: What to measure on; by default the first recipe's ``evaluation.final_zero_shot``, else its ``zero_shot``.
        protocols: Names of `declip.evaluation.protocols.PROTOCOLS`.
        budgets: "samples", "compute" or both.
        reference: Whose time is the compute budget; by default the last recipe's.
        ladder: See `declip.comparison.arms.arms_of`.
        baselines: The same.
        tune: Values by key. Every arm tries every combination on `tune_on` first, and keeps its best.
        tune_on: The validation set; by default the recipe's ``evaluation.zero_shot``. Never one of `on`.
        tune_pairs: Of a try; by default the middle one of `pairs`.
        tune_steps: Of a try; by default ``train.steps``.
        jobs: Processes; by default one for each core, at most 8, or one on an accelerator.
        quiet: No progress bar.

    Returns:
        The outcome; `complete` is False after Ctrl-C. The folder holds results.json.

    Raises:
        UserError: what was given can't be used, the folder holds another comparison, or runs failed.
    """
    folder = Path(out)
    overrides = dict(overrides or {})
    arms = arms_of(recipes, overrides, ladder=ladder, baselines=baselines)
    first = arms[0].resolve()
    chosen_seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    study = Study(
        arms=tuple(arms),
        pairs=tuple(sorted(set(pairs))),
        seeds=chosen_seeds,
        steps=first.train.steps,
        batch=first.train.batch_size,
        on=tuple(on) or first.evaluation.final_zero_shot or first.evaluation.zero_shot,
        protocols=tuple(protocols),
        budgets=tuple(budget for budget in BUDGETS if budget in budgets),
        reference=reference or arms[len(recipes) - 1].name,
        tuning=_tuning(tune, tune_on, tune_pairs, tune_steps, first, pairs, chosen_seeds),
    )
    _check(study, budgets)
    study = _open(study, folder, keep_tuning_pairs=tune_pairs is None)
    jobs, threads = _workers(first, jobs)
    with FileLock(folder / ".plan.lock"):
        study = _timed(read_study(folder) or study, folder, threads, quiet)
    if study.tuning is None or _run(study, folder, TUNING, jobs, threads, quiet):
        study = _tuned(study, folder)
        _run(study, folder, RUNS, jobs, threads, quiet)
    outcome = read_outcome(folder)
    write_results(outcome, folder)
    return outcome


def _tuning(
    grid: Mapping[str, Sequence[Any]] | None,
    on: str | None,
    pairs: int | None,
    steps: int | None,
    recipe: Recipe,
    sizes: Sequence[int],
    seeds: Sequence[int],
) -> Tuning | None:
    if not grid:
        return None
    validation = on or next(iter(recipe.evaluation.zero_shot), None)
    if validation is None:
        raise UserError("Tuning needs a validation set that no result is reported on. Name one with --sweep-dataset.")
    middle = sorted(sizes)[(len(sizes) - 1) // 2]
    seed = max(seeds, default=0) + 1000  # another choice of pairs than any run's
    values = {key: tuple(options) for key, options in grid.items()}
    return Tuning(values, validation, pairs or middle, steps or recipe.train.steps, seed)


def _check(study: Study, budgets: Sequence[str]) -> None:
    """Say what can't be used before anything is timed or trained."""
    if not study.pairs or not study.seeds:
        raise UserError("A comparison needs at least one number of pairs and one seed.")
    for budget in budgets:
        if budget not in BUDGETS:
            raise unknown("budget", budget, BUDGETS)
    for protocol in study.protocols:
        if protocol not in PROTOCOLS:
            raise unknown("protocol", protocol, PROTOCOLS)
    if study.reference not in {arm.name for arm in study.arms}:
        raise unknown("reference", study.reference, [arm.name for arm in study.arms])
    if not study.on:
        raise UserError("Nothing to measure on: the recipe names no set for zero-shot. Name one with --dataset.")
    if study.tuning is not None and study.tuning.on in study.on:
        raise UserError(
            f"'{study.tuning.on}' would both choose and be reported, so its numbers would be too good. Name another "
            "set with --dataset or --sweep-dataset."
        )
    for arm in study.arms:
        for combination in study.tuning.combinations() if study.tuning else ():
            arm.resolve(combination)
    smallest = study.pairs[0]
    if smallest < study.batch:
        raise UserError(
            f"{smallest} pairs are fewer than one batch of {study.batch}. Ask for more pairs, or set train.batch_size."
        )
    sources: dict[str, int] = {}
    for arm in study.arms:
        recipe = arm.resolve()
        if recipe.train.batch_size != study.batch or recipe.train.steps != study.steps:
            raise UserError(
                f"'{arm.name}' takes {recipe.train.steps} steps of {recipe.train.batch_size} pairs, "
                f"'{study.arms[0].name}' {study.steps} of {study.batch}: they would not see equally many. "
                "Set train.steps and train.batch_size for all."
            )
        key = recipe.data.model_dump_json()
        if key not in sources:
            source = open_training_source(recipe)
            sources[key] = source.distinct if isinstance(source, Mixture) else len(source)
        if study.pairs[-1] > sources[key]:
            raise UserError(
                f"'{recipe.data.label}' holds {sources[key]:,} pairs, fewer than the {study.pairs[-1]:,} asked for. "
                "Ask for at most that many."
            )
    from declip.evaluation.datasets import open_dataset

    for name in (*study.on, *([study.tuning.on] if study.tuning else [])):
        open_dataset(name)


def _open(study: Study, folder: Path, keep_tuning_pairs: bool = True) -> Study:
    """Make the folder, or go on with the comparison that is in it; its tuning keeps the seed it was given then."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make '{folder}': {error.strerror}. Choose another folder with --out.") from error
    if not (folder / STUDY).exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise UserError(f"'{folder}' is not empty and holds no comparison. Choose another folder with --out.")
    with FileLock(folder / ".plan.lock"):
        earlier = read_study(folder)
        if earlier is not None:
            if study.tuning is not None and earlier.tuning is not None:
                pairs = earlier.tuning.pairs if keep_tuning_pairs else study.tuning.pairs
                study = replace(study, tuning=replace(study.tuning, seed=earlier.tuning.seed, pairs=pairs))
            study = extended(study, earlier, folder)
        write_study(study, folder)
    return study


def _workers(recipe: Recipe, jobs: int | None) -> tuple[int, int]:
    """How many processes, and threads of each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    accelerated = recipe.train.device not in {"auto", "cpu"} or (
        recipe.train.device == "auto" and torch.cuda.is_available()
    )
    jobs = jobs or (1 if accelerated else min(cores, MOST_JOBS))
    return jobs, recipe.train.threads or max(1, cores // jobs)


def _timed(study: Study, folder: Path, threads: int, quiet: bool) -> Study:
    """Measure what a step of each arm costs, those that joined later in turns with the reference."""
    new = [arm for arm in study.arms if arm.name not in study.seconds]
    if not new:
        return study
    overrides = {**UNMEASURED, "train.batch_size": study.batch, "data.max_pairs": study.pairs[0]}
    known = study.arm(study.reference)
    timed: list[Arm] = new if known in new else [known, *new]
    with status(f"Timing a step of {', '.join(arm.name for arm in new)}", not quiet):
        seconds = seconds_per_step(timed, overrides, threads)
    scale = study.seconds.get(known.name, seconds[known.name]) / seconds[known.name]
    measured = {arm.name: seconds[arm.name] * scale for arm in new}
    machine = study.machine or {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads a run": str(threads),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    study = replace(study, seconds={**study.seconds, **measured}, machine=machine)
    write_study(study, folder)
    return study


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _tuned(study: Study, folder: Path) -> Study:
    """Keep each arm's best try."""
    if study.tuning is None:
        return study
    chosen: dict[str, Mapping[str, Any]] = {}
    for arm in study.arms:
        tries = [(cell, read_cell(folder, cell)) for cell in study.tuning_cells() if cell.arm == arm.name]
        done = [(tuning_score(row), cell) for cell, row in tries if row is not None]
        if not done:
            reason = next((failure(folder, cell) for cell, _ in tries if failure(folder, cell)), "none was run")
            raise UserError(f"No try of '{arm.name}' came to its end, so nothing can be chosen for it: {reason}")
        chosen[arm.name] = max(done, key=lambda pair: pair[0])[1].overrides
    study = replace(study, chosen=chosen)
    write_study(study, folder)
    return study


def _run(study: Study, folder: Path, part: str, jobs: int, threads: int, quiet: bool) -> bool:
    """Start the workers and watch them; False when stopped."""
    cells = cells_of(study, part)
    left = [cell for cell in cells if read_cell(folder, cell) is None]
    if not left:
        return True
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "declip.comparison.worker", str(folder), part, str(threads)]
    logs = [folder / f"worker{number}.log" for number in range(min(jobs, len(left)))]
    workers = []
    for path in logs:
        with path.open("w", encoding="utf-8") as file:
            # In a session of their own: Ctrl-C reaches this process alone, which then asks them once. Asked twice
            # they would stop without saving.
            workers.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True))
    try:
        _watch(study, folder, part, workers, quiet)
    except KeyboardInterrupt:
        Console(stderr=True, quiet=quiet).print("Stopping: every run saves a checkpoint …")
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait()
        return False
    for worker, path in zip(workers, logs, strict=True):
        if worker.returncode not in (0, 130):
            told = path.read_text(encoding="utf-8").strip().splitlines() or ["it said nothing"]
            raise UserError(
                f"A process of the comparison ended with status {worker.returncode}: {told[-1]}. "
                f"Its log is '{path}'. Give the same command to go on; fewer --jobs need less memory."
            )
    return all(worker.returncode == 0 for worker in workers)


def _watch(study: Study, folder: Path, part: str, workers: Sequence[subprocess.Popen[bytes]], quiet: bool) -> None:
    """Show the progress of all runs, by the time that their steps take, until the workers end.

    On a terminal that is one bar; elsewhere lines also say which run ended, how, and how far those under way are.
    """
    cells = cells_of(study, part)
    plain, console = not on_terminal(), Console(stderr=True, quiet=quiet)
    states: dict[str, str] = {}

    def look() -> tuple[float, str]:
        """How many seconds the steps done take, and which runs are under way."""
        seconds, running = 0.0, []
        for number, cell in enumerate(cells, 1):
            before = states.get(cell.id)
            if before != "done":
                reason = failure(folder, cell)
                ended = "done" if read_cell(folder, cell) is not None else "failed" if reason else ""
                states[cell.id] = ended
                if plain and ended and before == "":
                    why = f": {reason.splitlines()[-1]}" if reason else ""
                    print_line(console, f"run {number} of {len(cells)} {ended}: {cell.id}{why}")
            steps = cell.steps if states[cell.id] == "done" else steps_done(folder, cell)
            seconds += steps * study.seconds[cell.arm]
            if steps and not states[cell.id]:
                running.append(f"run {number} at step {steps:,} of {cell.steps:,} ({cell.id})")
        return seconds, ", ".join(running)

    with progress_bar(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[runs]} runs"),
        *([TextColumn("{task.fields[running]}")] if plain else []),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        shown=not quiet,
        speed_estimate_period=300,
        refresh_per_second=2,
    ) as bar:
        label = "tuning" if part == TUNING else "comparing"
        total = sum(cell.steps * study.seconds[cell.arm] for cell in cells)
        task = bar.add_task(label, total=total, completed=int(look()[0]), runs="", running="")
        while True:
            alive = any(worker.poll() is None for worker in workers)
            seconds, running = look()
            done = sum(state == "done" for state in states.values())
            bar.update(task, completed=seconds, runs=f"{done}/{len(cells)}", running=running)
            if not alive:
                return
            time.sleep(LOOK_EVERY)
