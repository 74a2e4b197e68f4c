"""The run folder: what it holds, and whether a run may start or go on in it."""

import json
import logging
import errno
import fcntl
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from declip.recipe.schema import Recipe
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset, with_classes
from declip.models.hf_encoder import ENTRY, TextEncoder, encoder_kept_in
from declip.recipe.load import load_recipe
from declip.runs.checkpoint import WEIGHTS, Checkpoint, list_checkpoints, newest_good

RECIPE, METRICS, EVALUATIONS = "recipe.yaml", "metrics.jsonl", "evaluations.jsonl"
KEPT = "start.safetensors"
"""The pretrained weights as they were taken over: with them a run resumes and is compared with its start."""
log = logging.getLogger("declip")
LOCK = ".lock"
CHANGEABLE = (
    "data.workers",
    "data.shard_cache_gb",
    "train.rank_timeout",
    "train.device",
    "train.threads",
    "train.keep_checkpoints",
    "train.checkpoint_every",
    "name",
)
"""Recipe keys that may differ between a run and its resumption: none of them changes a number."""


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run.

    Attributes:
        folder: Holds recipe.yaml, metrics.jsonl, evaluations.jsonl, skipped.json, checkpoints, report.html.
        recipe: The resolved recipe.
        step: Steps done.
        finished: Whether all steps are done.
        status: What the process ends with when the run is not finished: 130 after Ctrl-C, 75 (try again later) after
            SIGTERM, SIGUSR1 or the file "stop", but 0 there under torchrun.
        leads: Whether this process is the first of those that train together.
    """

    folder: Path
    recipe: Recipe
    step: int
    finished: bool
    status: int = 130
    leads: bool = True

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read_rows(self.folder / METRICS)

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of evaluations.jsonl."""
        return read_rows(self.folder / EVALUATIONS)

    @property
    def results(self) -> list[dict[str, Any]]:
        """The evaluations of the last step."""
        return [row for row in self.evaluations if row["step"] == self.step]

    @property
    def report(self) -> Path:
        """Where the report is."""
        return self.folder / "report.html"


def check_datasets(recipe: Recipe) -> None:
    """Open what the recipe measures on.

    Raises:
        UserError: one of them is missing, empty, or has no classes though zero-shot is wanted.
    """
    wanted = recipe.evaluation
    zero_shot = {*wanted.zero_shot, *wanted.final_zero_shot}
    for name in dict.fromkeys((*sorted(zero_shot), *wanted.retrieval, *wanted.final_retrieval)):
        dataset = open_dataset(name)
        if name in zero_shot:
            with_classes(dataset.split("test"))


def lock_folder(folder: Path) -> FileIO:
    """Make the run folder and lock it for this process.

    The lock is the system's and of this process alone: it ends with the process however that ends, and worker processes
    that outlive a killed one do not inherit it.

    Returns:
        The open file that holds the lock; closing it gives the folder free.

    Raises:
        UserError: the folder can't be written, or another process trains in it; it is named.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab+", buffering=0)
    except OSError as error:
        raise _not_writable(folder, error) from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):  # a file system without locks: nothing can be known
            return file
        file.seek(0)
        holder = file.read().decode(errors="replace") or "another process"
        file.close()
        raise UserError(
            f"'{folder}' is in use: {holder} trains in it. Wait until that run ends or stop it, or choose another "
            "folder with --out."
        ) from error
    with suppress(OSError):  # a full disk is the run's to report
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def open_folder(recipe: Recipe, folder: Path, resume: bool) -> Checkpoint | None:
    """Begin a run in a locked folder, or find where the run in it stopped.

    Args:
        recipe: What is to be run.
        folder: The run folder.
        resume: Go on if there is something to go on with.

    Returns:
        The newest good checkpoint, or None for a new start.

    Raises:
        UserError: the folder holds a run and `resume` is off, it holds another recipe's run, it can't be written,
            or none of its checkpoints is whole.
    """
    if not (folder / RECIPE).exists():
        _write_recipe(recipe, folder)
        return None
    if not resume:
        raise UserError(
            f"'{folder}' already holds a run. Go on with it by --resume, or choose another folder with --out."
        )
    refuse_another(recipe, read_recipe(folder), folder)
    _write_recipe(recipe, folder)
    return _newest(folder)


def kept_encoder(recipe: Recipe, folder: Path) -> TextEncoder | None:
    """The text encoder in the newest good checkpoint, so that a run goes on without the folder that it came from.

    Returns:
        None where the recipe has CLIP's text tower, or nothing is there to go on from.
    """
    if recipe.text.hf_model is None:
        return None
    for checkpoint in reversed(list_checkpoints(folder)):
        with suppress(OSError, SafetensorError, UserError), safe_open(checkpoint / WEIGHTS, "pt") as file:
            return encoder_kept_in({ENTRY: file.get_tensor(f"model.{ENTRY}")}, recipe, checkpoint)
    return None


def read_recipe(folder: Path) -> Recipe:
    """The resolved recipe of a run folder.

    Raises:
        UserError: there is none, or it does not fit this version.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise UserError(f"'{folder}' is not a run folder: it has no {RECIPE}.")
    try:
        return load_recipe(path)
    except ValueError as error:
        raise UserError(
            f"'{folder}' holds no run of this version of declip. {error} Choose another folder with --out."
        ) from error


def refuse_another(recipe: Recipe, earlier: Recipe, folder: Path) -> None:
    """Refuse to go on with a run under a recipe that would change its numbers.

    Raises:
        UserError: names up to five keys that differ, with both values.
    """
    now, then = flat(recipe.model_dump(mode="json")), flat(earlier.model_dump(mode="json"))
    changed = [key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]
    changed = [key for key in changed if key not in CHANGEABLE]
    if changed:
        shown = "; ".join(f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"'{folder}' holds the run of another recipe ('{earlier.name}'): {shown}{more}. "
            "Give the same recipe and overrides to go on, or another folder with --out."
        )


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe beside and rename it: a full disk leaves no half of one."""
    partial = folder / f"{RECIPE}.partial"
    try:
        partial.write_text(recipe.to_yaml(), encoding="utf-8")
        partial.replace(folder / RECIPE)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise _not_writable(folder, error) from error


def _not_writable(folder: Path, error: OSError) -> UserError:
    return UserError(f"Cannot write into the run folder '{folder}': {error.strerror}. Choose another with --out.")


def _newest(folder: Path) -> Checkpoint | None:
    checkpoint, problems = newest_good(folder)
    for problem in problems:
        log.warning(problem)
    if checkpoint is None and list_checkpoints(folder):
        raise UserError(f"No checkpoint in '{folder}' is whole. {problems[0]} Start anew in another folder with --out.")
    if problems and checkpoint is not None:
        log.warning("Going on from the newest good checkpoint, step %d.", checkpoint.step)
    return checkpoint


def flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a tree, such as a recipe's, by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a JSONL file; lines that a crash or a disk damaged are left out."""
    if not path.exists():
        return []
    rows = map(parse_row, path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [row for row in rows if row is not None]


def parse_row(line: str) -> dict[str, Any] | None:
    """A line as a row, None where it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
