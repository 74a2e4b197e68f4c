"""Run a comparison in a folder, and collect the results."""

import json
from pathlib import Path

from filelock import FileLock
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from declip.comparison import trials
from declip.comparison.outcome import Outcome, read_outcome
from declip.comparison.study import STUDY, Study, extended, read_study, write_study
from declip.errors import UserError
from declip.io.atomic import write_text
from declip.io.progress import progress_bar

RESULTS = "results.json"


def run(study: Study, out: str | Path, quiet: bool = False) -> Outcome:
    """Run a comparison in a folder; called again after a stop, it continues.

    Every trial trains on the pairs that its seed selects, for the steps of its recipe, and is then evaluated.

    Args:
        out: Folder of the comparison. Several processes may share it: each takes trials that are free.

    Returns:
        The outcome, which is also in results.json; `complete` is False after Ctrl-C.
    """
    folder = Path(out).expanduser()
    earlier = read_study(folder)
    (study if earlier is None else extended(study, earlier, folder)).check()
    study = open_folder(study, folder)
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
