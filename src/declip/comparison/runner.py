"""Run a comparison in a folder: train, evaluate and save one trial at a time.

Any number of processes may share the folder, on one machine or several: each trial has a lock.
"""

import json
import shutil
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import Timeout
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from declip.comparison.outcome import FAILURE, RESULT, RUNS, Outcome, folder_of, read_outcome
from declip.comparison.study import BUDGETS, Study, Trial, extend_study
from declip.errors import UserError, unknown
from declip.evaluation.datasets import open_dataset
from declip.evaluation.protocols import Options, check_dataset, evaluate_all
from declip.io.atomic import file_lock, write_text
from declip.io.outputs import STUDY_FILE, check_folder
from declip.io.progress import progress_bar, status
from declip.io.text import join_words, plural
from declip.runs.folder import log
from declip.supervision.objective import active_terms
from declip.training.assemble import assemble
from declip.training.estimate import step_seconds
from declip.training.pairs import open_training_source
from declip.training.state import Extensions, versions
from declip.training.trainer import Trainer

RESULTS = "results.json"
# rounds of timing, and steps per round: warm-up fills caches and chooses kernels
ROUNDS = 3
WARM = 3
TIMED = 8
WITHOUT_EVALUATION: dict[str, Any] = {
    "evaluation.val": (),
    "evaluation.zero_shot": (),
    "evaluation.retrieval": (),
    "evaluation.final_zero_shot": (),
    "evaluation.final_retrieval": (),
    "train.evaluate_every": 0,
    "train.patience": None,
}
"""Overrides of every trial: the comparison evaluates after the last step."""


def run(study: Study, out: str | Path, progress: bool = True) -> Outcome:
    """Run a comparison in a folder; called again after a stop, it continues.

    Every trial trains on the pairs that its seed selects, for the steps of its variant, and is then evaluated.

    Args:
        out: Folder of the comparison. Several processes may share it: each takes trials that are free, and all end
            when the last trial has.

    Returns:
        The outcome, which is also in results.json; `complete` is False after Ctrl-C.
    """
    folder = Path(out).expanduser()
    asked = study.trials()
    check(extend_study(study, folder))
    study = open_folder(study, folder, progress)
    # --- the trials that are left; those that failed are tried again
    left = []
    for trial in study.trials():
        run_folder = folder_of(folder, trial)
        if not (run_folder / RESULT).is_file():
            left.append(trial)
            (run_folder / FAILURE).unlink(missing_ok=True)
    earlier = [trial for trial in left if trial not in asked]
    if earlier:
        names = sorted({trial.variant for trial in earlier})
        log.warning(
            "'%s' also lacks %s of earlier commands, of %s: run now. To leave them out, give another --out.",
            out,
            plural(len(earlier), "run"),
            join_words(names),
        )
    columns = (
        TextColumn("runs"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with progress_bar(*columns, progress=progress) as bar:
        task = bar.add_task("runs", total=len(left))
        work(study, folder, left, lambda: bar.advance(task))
    # --- the results of all processes
    outcome = read_outcome(folder)
    tree = {
        "study": outcome.study.to_dict(),
        "runs": [*outcome.rows.values()],
        "failures": outcome.failures,
    }
    write_text(folder / RESULTS, json.dumps(tree, indent=1))
    return outcome


def check(study: Study) -> None:
    """Refuse what cannot be compared, before anything is timed or trained."""
    study.check_names()
    if study.budget not in BUDGETS:
        raise unknown("budget", study.budget, BUDGETS)
    for key, option in (("seed", "--seeds"), ("data.max_pairs", "--pairs")):
        if any(key in variant.overrides for variant in study.variants):
            raise UserError(f"A comparison sets {key} itself, from {option}. Remove {key}.")
    if not study.datasets:
        raise UserError(
            "Nothing to evaluate on: the recipe names no zero-shot set. Name one with --dataset."
        )
    # --- evaluation sets
    for dataset, task in product(map(open_dataset, study.datasets), study.tasks):
        check_dataset(dataset, task)
    # --- recipes, losses and training pairs
    sizes: dict[str, int] = {}
    unused = set(study.terms)
    for variant in study.variants:
        recipe = variant.resolve()
        unused -= active_terms(recipe, study.terms).keys()
        if recipe.train.epochs is not None:
            raise UserError(
                f"'{variant.name}' sets train.epochs, so its steps depend on the number of pairs. Set train.steps."
            )
        if study.pairs[0] < recipe.train.batch_size:
            raise UserError(
                f"{study.pairs[0]} pairs are fewer than one batch of {recipe.train.batch_size} of '{variant.name}'. "
                "Use more pairs, or set train.batch_size."
            )
        # Counting the pairs of a large source takes minutes, so recipes with the same data share it.
        key = recipe.data.model_dump_json()
        if key not in sizes:
            sizes[key] = len(open_training_source(recipe.data, recipe.seed))
        if study.pairs[-1] > sizes[key]:
            raise UserError(
                f"'{recipe.data.label}' has {sizes[key]:,} pairs, fewer than the {study.pairs[-1]:,} of --pairs."
            )
    if unused:
        name = min(unused)
        raise UserError(
            f"No recipe uses the loss '{name}'. Set loss_weights.{name} in one of them."
        )


def open_folder(study: Study, folder: Path, progress: bool = False) -> Study:
    """Create the folder of a study, or add the study to the comparison in it; at equal compute, time what is new."""
    check_folder(folder, STUDY_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot create '{folder}': {error.strerror}. Choose another folder with --out."
        ) from error
    with file_lock(folder / ".plan.lock"):
        study = extend_study(study, folder)
        study.check_names()
        if study.budget == "compute":
            study = _time_steps(study, progress)
        write_text(folder / STUDY_FILE, json.dumps(study.to_dict(), indent=1))
    return study


def _time_steps(study: Study, progress: bool) -> Study:
    """Time a step of the new variants, loading included, and set the steps that fit the budget."""
    first = study.variants[0]
    new = [variant for variant in study.variants if variant.seconds is None]
    if not new:
        return study
    # --- in turns with the first variant, so that a machine that slows down does so for all of them
    overrides = {**WITHOUT_EVALUATION, "data.max_pairs": study.pairs[0]}
    recipes = {variant.name: variant.resolve(overrides) for variant in (first, *new)}
    times: dict[str, list[float]] = {name: [] for name in recipes}
    extensions = Extensions(terms=study.terms)
    with status(f"Timing a step of {', '.join(variant.name for variant in new)}", progress):
        for name in [*recipes] * ROUNDS:
            with TemporaryDirectory() as folder:
                run_folder = Path(folder) / "run"
                parts = assemble(recipes[name], run_folder, extensions=extensions)
                times[name] += step_seconds(parts, WARM, TIMED)
    measured = {name: median(values) for name, values in times.items()}
    # --- as if the machine were as fast as when the first variant was timed
    base = measured[first.name]
    scale = (first.seconds or base) / base
    variants = list(study.variants)
    for index, variant in enumerate(variants):
        if variant.seconds is None:
            own = measured[variant.name]
            steps = max(1, int(first.steps * (base / own)))
            variants[index] = replace(variant, steps=steps, seconds=scale * own)
    return replace(study, variants=tuple(variants))


def run_trial(study: Study, trial: Trial, folder: Path) -> bool:
    """Train or resume a trial, evaluate it, save its scores and delete its weights; False after Ctrl-C or SIGTERM."""
    # --- train
    run_folder = folder_of(folder, trial)
    variant = study.variant(trial.variant)
    overrides = {"train.steps": variant.steps, "data.max_pairs": trial.pairs, "seed": trial.seed}
    recipe = variant.resolve(overrides | WITHOUT_EVALUATION)
    extensions = Extensions(terms=study.terms)
    parts = assemble(recipe, run_folder, resume=True, extensions=extensions)
    trainer = Trainer(parts, progress=False)
    run = trainer.train()
    if not run.finished:
        return False
    # --- evaluate
    options = Options(progress=False)
    results = (evaluate_all(parts.model, name, study.tasks, options) for name in study.datasets)
    row = {
        **asdict(trial),
        "steps": run.recipe.train.steps,
        "samples": variant.samples,
        "seconds": round(run.seconds, 1),
        "loss": run.metrics[-1]["loss"] if run.metrics else None,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": versions(),
        "results": [result.to_dict() for of_set in results for result in of_set],
    }
    write_text(run_folder / RESULT, json.dumps(row, indent=1))
    # --- a hundred finished runs would fill a disk
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run_folder / name, ignore_errors=True)
    return not trainer.stop.asked


def work(
    study: Study,
    folder: Path,
    trials: Iterable[Trial],
    advance: Callable[[], object] = lambda: None,
) -> None:
    """Run the trials that are not finished, first those that no other process has taken, until Ctrl-C."""
    (folder / RUNS).mkdir(exist_ok=True)
    taken: list[Trial] = []
    # A lock ends with its process, also when that is killed: then this process continues its trial.
    for timeout, some in ((0, trials), (-1, taken)):  # at once, then without end
        for trial in some:
            try:
                with file_lock(Path(f"{folder_of(folder, trial)}.lock"), timeout=timeout):
                    if not _run(study, trial, folder):
                        return
                advance()  # it has ended, here or in another process
            except Timeout:
                taken.append(trial)


def _run(study: Study, trial: Trial, folder: Path) -> bool:
    """Run a trial unless it is finished or failed elsewhere; False after Ctrl-C."""
    run_folder = folder_of(folder, trial)
    failure = run_folder / FAILURE
    if failure.is_file() or (run_folder / RESULT).is_file():
        return True
    try:
        return run_trial(study, trial, folder)
    except UserError as error:
        write_text(failure, str(error))
    except Exception:
        write_text(failure, traceback.format_exc())
    return True
