"""Compare recipes: plan the trials, time their steps, sweep, run them in worker processes, collect the results."""

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
from declip.comparison.outcome import RESULTS, Outcome, read_outcome, sweep_score
from declip.comparison.study import BUDGETS, STUDY, Study, Sweep, Trial, extended, read_study, write_study
from declip.comparison.variants import variants_of
from declip.comparison.worker import COMPARISON, SWEEP, UNMEASURED, failure, read_trial, trials_of
from declip.data.sources.mixture import Mixture
from declip.errors import UserError, unknown
from declip.evaluation.datasets import open_dataset, with_classes
from declip.evaluation.probes.data import check_probe
from declip.evaluation.protocols import TASKS
from declip.io.atomic import write_text
from declip.io.progress import progress_bar, status
from declip.models.device import pick_device
from declip.recipe.schema import Recipe
from declip.training.estimate import step_seconds
from declip.training.setup import open_training_source, versions
from declip.training.trainer import Trainer

MOST_JOBS = 8
LOOK_EVERY = 1.0  # seconds between two looks at the progress of the trials
ROUNDS, WARM, TIMED = 3, 3, 8  # rounds of timing, and steps of a round: the first few fill caches and choose kernels


def compare(
    recipes: Sequence[str],
    pairs: Sequence[int],
    seeds: int | Sequence[int] = 3,
    *,
    out: str | Path,
    overrides: Mapping[str, Any] | None = None,
    datasets: Sequence[str] = (),
    tasks: Sequence[str] = ("zero-shot",),
    budgets: Sequence[str] = BUDGETS,
    compute_budget_of: str | None = None,
    ablation: bool = False,
    sweep: Mapping[str, Sequence[Any]] | None = None,
    sweep_datasets: Sequence[str] = (),
    sweep_pairs: int | None = None,
    sweep_steps: int | None = None,
    jobs: int | None = None,
    quiet: bool = False,
) -> Outcome:
    """Compare recipes at several numbers of distinct pairs; called again after a stop, it continues.

    Every trial learns from `pairs` pairs that its seed chooses (a larger number keeps all that a smaller one chose) and
    is then measured. At equal samples every recipe takes `train.steps` steps; at equal compute, as many as fit into
    the time of `compute_budget_of`, by the seconds a step that were measured before the first trial.

    Args:
        recipes: Shipped recipes' names or YAML files.
        seeds: How many, counted from 0, or which.
        out: Folder of the comparison. Several processes may share it: each takes trials that are free.
        datasets: Sets to measure on; by default the first recipe's ``evaluation.final_zero_shot``, else its
            ``zero_shot``.
        compute_budget_of: The variant whose time is the compute budget; by default the last recipe.
        ablation: Whether to take the last recipe apart, see `declip.comparison.variants.ablation_of`.
        sweep: Values by key. Every variant tries every combination on `sweep_datasets` first, and keeps its best.
        sweep_datasets: Validation sets; by default the recipe's ``evaluation.zero_shot``. Never one of `datasets`.
        sweep_pairs, sweep_steps: Of a try; by default the middle one of `pairs`, and ``train.steps``.
        jobs: Worker processes; 0 runs the trials in this one. By default one for each core (for every OMP_NUM_THREADS
            cores where that is set), at most 8, or one on an accelerator.

    Returns:
        The outcome, which is also in results.json; `complete` is False after Ctrl-C.
    """
    seeds = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not (pairs and seeds and tasks and budgets):
        raise UserError("A comparison needs at least one number of pairs, one seed, one task and one budget.")
    folder = Path(out).expanduser()
    variants = variants_of(recipes, dict(overrides or {}), ablation)
    first, earlier = variants[0].resolve(), read_study(folder)
    # The recipe whose time is the budget, and the size of tries, stay when recipes and sizes join.
    kept = None if earlier is None else earlier.compute_budget_of
    program = Path(sys.argv[0]).name
    study = Study(
        variants=tuple(variants),
        pairs=tuple(sorted(set(pairs))),
        seeds=seeds,
        steps=first.train.steps,
        batch_size=first.train.batch_size,
        datasets=tuple(datasets) or first.evaluation.final_zero_shot or first.evaluation.zero_shot,
        tasks=tuple(tasks),
        budgets=tuple(budget for budget in BUDGETS if budget in budgets),
        compute_budget_of=compute_budget_of or kept or variants[len(recipes) - 1].name,
        commands=(("declip" if program == "__main__.py" else program, *sys.argv[1:]),),
    )
    if sweep:
        validation = tuple(sweep_datasets or first.evaluation.zero_shot)
        if not validation or set(validation) & set(study.datasets):
            raise UserError(
                f"A sweep needs validation sets that no result is reported on, not {', '.join(validation) or None}. "
                "Name them with --sweep-dataset."
            )
        if sweep_pairs is None and earlier is not None and earlier.sweep is not None:
            sweep_pairs = earlier.sweep.pairs
        middle = study.pairs[(len(study.pairs) - 1) // 2]
        lists = json.loads(json.dumps({key: list(values) for key, values in sweep.items()}, default=float))
        grid = {key: tuple(values) for key, values in lists.items()}
        study = replace(study, sweep=Sweep(grid, validation, sweep_pairs or middle, sweep_steps or study.steps))
    joined = study if earlier is None else extended(study, earlier, folder)
    _check(joined, (*budgets, *joined.budgets))
    study = open_folder(study, folder)
    jobs, threads = _processes(first, jobs)
    with FileLock(folder / ".plan.lock"):
        study = _timed(read_study(folder) or study, folder, threads, quiet)
    if study.sweep is None or _run(study, folder, SWEEP, jobs, threads, quiet):
        with FileLock(folder / ".plan.lock"):
            study = _timed(_with_chosen(read_study(folder) or study, folder), folder, threads, quiet)
        _run(study, folder, COMPARISON, jobs, threads, quiet)
    with FileLock(folder / ".plan.lock"):  # another process may be timing a recipe that joined
        outcome = read_outcome(folder)
    write_text(folder / RESULTS, json.dumps(outcome.to_dict(), indent=1))
    return outcome


def _check_names(study: Study) -> None:
    if len({Trial(variant.name, 0, 0, 0).id for variant in study.variants}) < len(study.variants):
        raise UserError("Two recipes' names differ only in signs that become '-' in names of folders. Rename one.")


def _check(study: Study, budgets: Sequence[str]) -> None:
    """Refuse what can't be used before anything is timed or trained."""
    _check_names(study)
    for kind, given, known in (
        ("budget", budgets, BUDGETS),
        ("task", study.tasks, TASKS),
        ("recipe of --compute-budget-of", [study.compute_budget_of], [variant.name for variant in study.variants]),
    ):
        for name in given:
            if name not in known:
                raise unknown(kind, name, known)
    chosen = [variant.overrides for variant in study.variants] + ([study.sweep.grid] if study.sweep else [])
    for key, option in (("seed", "--seeds"), ("data.max_pairs", "--pairs")):
        if any(key in keys for keys in chosen):
            raise UserError(f"A comparison sets {key} itself, from {option}. Leave {key} out.")
    for key in ("train.steps", "train.epochs", "train.batch_size"):
        if study.sweep and key in study.sweep.grid:
            raise UserError(f"A sweep cannot try {key}: all recipes see equally many pairs. Leave {key} out of it.")
    if not study.datasets:
        raise UserError("Nothing to measure on: the recipe names no set for zero-shot. Name one with --dataset.")
    if study.pairs[0] < study.batch_size:
        raise UserError(
            f"{study.pairs[0]} pairs are fewer than one batch of {study.batch_size}. Ask for more pairs, or set "
            "train.batch_size."
        )
    sizes: dict[str, int] = {}
    for variant in study.variants:
        recipe = variant.resolve()
        if recipe.train.epochs is not None:
            raise UserError(
                f"'{variant.name}' sets train.epochs, which is another number of steps for each number of pairs. Set "
                "train.steps instead."
            )
        if recipe.train.batch_size != study.batch_size or recipe.train.steps != study.steps:
            raise UserError(
                f"'{variant.name}' takes {recipe.train.steps} steps of {recipe.train.batch_size} pairs, "
                f"'{study.variants[0].name}' {study.steps} of {study.batch_size}: they would not see equally many. "
                "Set train.steps and train.batch_size for all."
            )
        key = recipe.data.model_dump_json()
        if key not in sizes:
            source = open_training_source(recipe)
            sizes[key] = source.distinct if isinstance(source, Mixture) else len(source)
        asked = max(study.pairs[-1], study.sweep.pairs if study.sweep else 0)
        if asked > sizes[key]:
            raise UserError(
                f"'{recipe.data.label}' holds {sizes[key]:,} pairs, fewer than the {asked:,} asked for. "
                "Ask for at most that many."
            )
        for combination in study.sweep.combinations() if study.sweep else ():
            variant.resolve(combination)
    for name in (*study.datasets, *(study.sweep.datasets if study.sweep else ())):
        dataset = open_dataset(name)
        if "zero-shot" in study.tasks:
            with_classes(dataset.split("test"))
        for task in {"linear", "knn"} & {*study.tasks}:
            check_probe(dataset, task)


def open_folder(study: Study, folder: Path) -> Study:
    """Make the folder of a study, or continue the comparison in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make '{folder}': {error.strerror}. Choose another folder with --out.") from error
    if not (folder / STUDY).exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise UserError(f"'{folder}' is not empty and holds no comparison. Choose another folder with --out.")
    with FileLock(folder / ".plan.lock"):
        earlier = read_study(folder)
        study = study if earlier is None else extended(study, earlier, folder)
        _check_names(study)
        write_study(study, folder)
    return study


def _processes(recipe: Recipe, jobs: int | None) -> tuple[int, int]:
    """The number of worker processes, and threads of each; OMP_NUM_THREADS says how many threads a process may have."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads() if os.environ.get("OMP_NUM_THREADS") else None
    if jobs is None:
        on_cpu = pick_device(recipe.train.device).type == "cpu"
        jobs = max(1, min(cores // (threads or 1), MOST_JOBS)) if on_cpu else 1
    return jobs, threads or max(1, cores // (jobs or 1))


def seconds_per_step(recipes: Mapping[str, Recipe], threads: int) -> dict[str, float]:
    """Time a step of every recipe, loading included: the median over all rounds, in `threads` threads.

    The recipes take turns, so that a machine that slows down meanwhile does so for all of them.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    times: dict[str, list[float]] = {name: [] for name in recipes}
    try:
        for name in [*recipes] * ROUNDS:
            with TemporaryDirectory() as folder:
                times[name] += step_seconds(Trainer(recipes[name], Path(folder) / "run", quiet=True), WARM, TIMED)
    finally:
        torch.set_num_threads(before)
    return {name: median(values) for name, values in times.items()}


def _timed(study: Study, folder: Path, threads: int, quiet: bool) -> Study:
    """Time new variants in turns with `compute_budget_of`, and scale them to the time that it had before."""
    new = [variant for variant in study.variants if variant.name not in study.seconds]
    if not new:
        return study
    overrides = {**UNMEASURED, "train.batch_size": study.batch_size, "data.max_pairs": study.pairs[0]}
    known = study.variant(study.compute_budget_of)
    timed = new if known in new else [known, *new]
    recipes = {each.name: each.resolve({**overrides, **study.chosen.get(each.name, {})}) for each in timed}
    with status(f"Timing a step of {', '.join(variant.name for variant in new)}", not quiet):
        seconds = seconds_per_step(recipes, threads)
    scale = study.seconds.get(known.name, seconds[known.name]) / seconds[known.name]
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"processor": platform.processor() or platform.machine(), "accelerator": accelerator}
    machine |= {**versions(), "threads": str(threads)}
    every = {**study.seconds, **{variant.name: seconds[variant.name] * scale for variant in new}}
    study = replace(study, seconds=every, machine=study.machine or machine)
    write_study(study, folder)
    return study


def _with_chosen(study: Study, folder: Path) -> Study:
    """Keep each variant's best try; its time was another's, and is forgotten."""
    chosen: dict[str, Mapping[str, Any]] = {}
    for variant in study.variants if study.sweep else ():
        tries = [trial for trial in study.sweep_trials() if trial.variant == variant.name]
        if not all(worker.has_ended(folder, trial) for trial in tries):
            raise UserError(f"Another process still tries '{variant.name}'. Give the same command when it has ended.")
        done = [(sweep_score(row), trial) for trial in tries if (row := read_trial(folder, trial)) is not None]
        if not done:
            reason = next(filter(None, (failure(folder, trial) for trial in tries)), "none was run")
            raise UserError(f"No try of '{variant.name}' was completed, so no values can be chosen for it: {reason}")
        chosen[variant.name] = max(done, key=lambda pair: pair[0])[1].overrides
    seconds = {name: value for name, value in study.seconds.items() if study.chosen.get(name) == chosen.get(name)}
    study = replace(study, chosen=chosen, seconds=seconds)
    write_study(study, folder)
    return study


def _run(study: Study, folder: Path, part: str, jobs: int, threads: int, quiet: bool) -> bool:
    """Run the trials of a part that are left, in `jobs` workers or in this process; False when stopped."""
    left = [trial for trial in trials_of(study, part) if read_trial(folder, trial) is None]
    for trial in left:
        (worker.folder_of(folder, trial) / worker.FAILURE).unlink(missing_ok=True)
    if not left:
        return True
    if jobs == 0:
        return worker.work(folder, part, threads)
    # Not by multiprocessing, which would run the user's script again in every worker.
    command = [sys.executable, "-m", "declip.comparison.worker", str(folder), part, str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    logs = [folder / f"worker{number}.log" for number in range(min(jobs, len(left)))]
    processes = []
    for path in logs:
        with path.open("w", encoding="utf-8") as file:
            # In a session of their own: Ctrl-C reaches this process alone, which then asks them once. Asked twice
            # they would stop without saving.
            options: dict[str, Any] = {"env": environment, "stdout": file, "stderr": file, "start_new_session": True}
            processes.append(subprocess.Popen(command, **options))
    try:
        watch(study, folder, part, processes, quiet)
    except KeyboardInterrupt:
        Console(stderr=True, quiet=quiet).print("Stopping: every trial saves a checkpoint …")
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
        return False
    for process, path in zip(processes, logs, strict=True):
        if process.returncode not in (0, 130):
            lines = path.read_text(encoding="utf-8").strip().splitlines() or ["no output"]
            raise UserError(
                f"A worker process ended with status {process.returncode}: {lines[-1]}. Its log is '{path}'. Give the "
                "same command to continue; fewer --jobs need less memory."
            )
    return all(process.returncode == 0 for process in processes)


def watch(study: Study, folder: Path, part: str, processes: Sequence[subprocess.Popen[bytes]], quiet: bool) -> None:
    """Show the progress of all trials, by the time that their steps take, until the workers end."""
    trials = trials_of(study, part)
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
        task = bar.add_task(part, total=total, completed=int(seconds_done()), runs="")
        alive = True
        while alive:
            alive = any(process.poll() is None for process in processes)
            runs = sum(worker.has_ended(folder, trial) for trial in trials)
            bar.update(task, completed=seconds_done(), runs=f"{runs}/{len(trials)}")
            if alive:
                time.sleep(LOOK_EVERY)
