"""Run a comparison in a folder, and collect the results."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from filelock import FileLock
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from declip.comparison import trials
from declip.comparison.outcome import Outcome, read_outcome
from declip.comparison.study import STUDY, Study, extended, read_study, write_study
from declip.errors import UserError
from declip.io.atomic import write_text
from declip.io.progress import progress_bar, status
from declip.training.assemble import assemble
from declip.training.estimate import step_seconds

RESULTS = "results.json"
ROUNDS, WARM, TIMED = 3, 3, 8  # rounds of timing, and steps per round: warm-up fills caches and chooses kernels


def run(study: Study, out: str | Path, quiet: bool = False) -> Outcome:
    """Run a comparison in a folder; called again after a stop, it continues.

    Every trial trains on the pairs that its seed selects, for the steps of its variant, and is then evaluated.

    Args:
        out: Folder of the comparison. Several processes may share it: each takes trials that are free.

    Returns:
        The outcome, which is also in results.json; `complete` is False after Ctrl-C.
    """
    folder = Path(out).expanduser()
    earlier = read_study(folder)
    (study if earlier is None else extended(study, earlier, folder)).check()
    study = open_folder(study, folder, quiet)
    # --- the trials that are left; those that failed are tried again
    left = [trial for trial in study.trials() if trials.read_trial(folder, trial) is None]
    for trial in left:
        (trials.folder_of(folder, trial) / trials.FAILURE).unlink(missing_ok=True)
    columns = (TextColumn("runs"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with progress_bar(*columns, shown=not quiet) as bar:
        trials.work(study, folder, bar.track(left, description="runs"))
    # --- the results of all processes
    outcome = read_outcome(folder)
    write_text(folder / RESULTS, json.dumps(outcome.to_dict(), indent=1))
    return outcome


def open_folder(study: Study, folder: Path, quiet: bool = True) -> Study:
    """Create the folder of a study, or add the study to the comparison in it; at equal compute, time what is new."""
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
        if study.budget == "compute":
            study = _timed(study, quiet)
        write_study(study, folder)
    return study


def _timed(study: Study, quiet: bool) -> Study:
    """Time a step of the variants that were not timed yet, loading included, and set the steps that fit the budget.

    They and the first variant alternate, so that a machine that slows down does so for all of them.
    """
    variants = {variant.name: variant for variant in study.variants}
    first, new = study.variants[0], [variant for variant in study.variants if variant.seconds is None]
    if not new:
        return study
    # --- measure
    overrides = {**trials.WITHOUT_EVALUATION, "data.max_pairs": study.pairs[0]}
    recipes = {variant.name: variant.resolve(overrides) for variant in (first, *new)}
    times: dict[str, list[float]] = {name: [] for name in recipes}
    with status(f"Timing a step of {', '.join(variant.name for variant in new)}", not quiet):
        for name in [*recipes] * ROUNDS:
            with TemporaryDirectory() as folder:
                times[name] += step_seconds(assemble(recipes[name], Path(folder) / "run", quiet=True), WARM, TIMED)
    measured = {name: median(values) for name, values in times.items()}
    # --- as if the machine were as fast as when the first variant was timed
    scale = (first.seconds or measured[first.name]) / measured[first.name]
    for variant in new:
        steps = max(1, int(first.steps * (measured[first.name] / measured[variant.name])))
        variants[variant.name] = replace(variant, steps=steps, seconds=scale * measured[variant.name])
    return replace(study, variants=tuple(variants.values()))
