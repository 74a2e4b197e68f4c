"""The run folder: its files and who may train in it. Only this module reads a run's JSONL files."""

import errno
import json
import logging
import math
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from declip.errors import UserError
from declip.evaluation.datasets import open_dataset, with_classes
from declip.evaluation.results import Result, read_result
from declip.models.hf_encoder import ENTRY, TextEncoder, encoder_kept_in
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import OLD_LAYOUT, WEIGHTS, Checkpoint, is_old_layout, list_checkpoints, newest_good

RECIPE, METRICS, EVALUATIONS, SKIPPED = "recipe.yaml", "metrics.jsonl", "evaluations.jsonl", "skipped.json"
KEPT = "start.safetensors"
"""The pretrained weights that a run began with: it resumes from them and is compared with them."""
LOCK = ".lock"
CHANGEABLE = (
    *("name", "data.workers", "train.device", "train.rank_timeout"),
    *("train.keep_checkpoints", "train.checkpoint_every"),
)
"""Recipe keys that may differ when a run is resumed: none of them changes a number."""
log = logging.getLogger("declip")


@dataclass(frozen=True)
class Evaluated:
    """A result and the step after which it was measured."""

    step: int
    result: Result


@dataclass(frozen=True)
class Run:
    """A run folder, whether its run is finished, interrupted or still going. Files are read once, when first needed.

    Attributes:
        folder: Holds recipe.yaml, metrics.jsonl, evaluations.jsonl, skipped.json, checkpoints, report.html.
        steps_done: Where `declip.train` gave this run, its steps; else they are read from its metrics.
        finished: Whether all steps are done, where `declip.train` gave this run.
        status: Exit status of the process when the run is not finished: 130 after Ctrl-C, 75 (try again later) after
            SIGTERM, SIGUSR1 or the file "stop", but 0 there under torchrun.
        is_rank_zero: Whether this process is the first of those that train together.
    """

    folder: Path
    steps_done: int | None = None
    finished: bool = False
    status: int = 130
    is_rank_zero: bool = True

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.folder.resolve().name

    @property
    def report(self) -> Path:
        """Path of the report."""
        return self.folder / "report.html"

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe; errors as `read_recipe`."""
        return read_recipe(self.folder)

    @cached_property
    def recipe_text(self) -> str:
        """Text of recipe.yaml, empty where there is none."""
        return _text(self.folder / RECIPE)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl by step; of a step that was logged twice, the later row."""
        return [row for _, row in sorted({row["step"]: row for row in read_rows(self.folder / METRICS)}.items())]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Rows of evaluations.jsonl."""
        return read_rows(self.folder / EVALUATIONS)

    @cached_property
    def evaluated(self) -> list[Evaluated]:
        """The evaluations whose protocol this version knows, by step."""
        found = [(row["step"], read_result(row)) for row in self.evaluations]
        return sorted((Evaluated(step, result) for step, result in found if result), key=lambda row: row.step)

    @property
    def results(self) -> list[dict[str, Any]]:
        """Rows of the evaluations after the last step."""
        return [row for row in self.evaluations if row["step"] == self.step]

    def measured(self, protocol: str, on: str) -> list[Evaluated]:
        """The evaluations of one protocol on one dataset."""
        return [row for row in self.evaluated if (row.result.task, row.result.dataset) == (protocol, on)]

    def last(self) -> list[Evaluated]:
        """The last evaluation of each protocol on each dataset."""
        return list({(row.result.dataset, row.result.task): row for row in self.evaluated}.values())

    @cached_property
    def _skipped(self) -> dict[str, Any]:
        text = _text(self.folder / SKIPPED)
        return json.loads(text) if text else {}

    @property
    def skipped(self) -> Mapping[str, Mapping[str, Any]] | None:
        """Reason → count and example keys of the pairs that could not be used; None before the first checkpoint."""
        return self._skipped.get("reasons")

    @property
    def seen(self) -> int:
        """Number of pairs seen when `skipped` was written."""
        return int(self._skipped.get("seen", 0))

    @property
    def step(self) -> int:
        """Number of steps done, as far as they were logged."""
        if self.steps_done is not None:
            return self.steps_done
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def samples_seen(self) -> int:
        """Pairs seen until the last logged step; a pair counts each time it is seen."""
        return int(self.metrics[-1]["samples_seen"]) if self.metrics else 0

    @property
    def samples_per_second(self) -> float | None:
        """Median over the logged steps."""
        speeds = self.column("samples_per_second")
        return float(np.nanmedian(speeds)) if np.isfinite(speeds).any() else None

    @property
    def seconds(self) -> float:
        """Duration of training in seconds, without evaluations and checkpoints."""
        return float(np.nansum(self.column("seconds")))

    @property
    def steps(self) -> np.ndarray:
        """(rows,) int64, the logged steps."""
        return np.array([row["step"] for row in self.metrics], dtype=np.int64)

    @property
    def terms(self) -> list[str]:
        """Names of the losses, in the order of the first row."""
        return list(dict.fromkeys(name for row in self.metrics for name in row.get("losses", {})))

    def column(self, name: str) -> np.ndarray:
        """(rows,) float64 of a metric; "losses.NAME" for a loss; NaN where a row lacks it."""
        return np.array([_number(row, name.split(".", 1)) for row in self.metrics], dtype=np.float64)


def read_run(folder: str | Path) -> Run:
    """Open a run folder, which must exist, for reading; files that are not there yet count as empty."""
    if not Path(folder).is_dir():
        raise UserError(f"There is no run folder '{folder}'. Give the folder of a run.")
    return Run(Path(folder))


def check_datasets(recipe: Recipe) -> None:
    """Open every dataset that the recipe evaluates on.

    Raises:
        UserError: one of them is missing or empty, or has no classes though zero-shot classification is wanted.
    """
    wanted = recipe.evaluation
    zero_shot = {*wanted.zero_shot, *wanted.final_zero_shot}
    for name in dict.fromkeys((*sorted(zero_shot), *wanted.retrieval, *wanted.final_retrieval)):
        dataset = open_dataset(name)
        if name in zero_shot:
            with_classes(dataset.split("test"))


def lock_folder(folder: Path) -> FileIO:
    """Make the run folder and lock it for this process, until the returned file is closed.

    The operating system releases the lock however the process ends, and worker processes do not inherit it. A system
    or file system without such locks gives none.

    Raises:
        UserError: the folder cannot be written, or another process trains in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("ab+", buffering=0)
    except OSError as error:
        raise _not_writable(folder, error) from error
    try:
        import fcntl  # not on Windows
    except ImportError:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return file
        file.seek(0)
        holder = file.read().decode(errors="replace") or "another process"
        file.close()
        raise UserError(
            f"'{folder}' is in use: {holder} trains in it. Wait until that run ends, stop it, or choose another "
            "folder with --out."
        ) from error
    with suppress(OSError):  # a full disk is reported when the run writes
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def open_folder(recipe: Recipe, folder: Path, resume: bool) -> Checkpoint | None:
    """Begin a run in a locked folder, or find where the run in it stopped.

    Returns:
        The newest good checkpoint, or None for a new start.

    Raises:
        UserError: the folder holds a run and `resume` is off, it holds another recipe's run, it cannot be written,
            or none of its checkpoints is complete.
    """
    if not (folder / RECIPE).exists():
        _write_recipe(recipe, folder)
        return None
    if not resume:
        raise UserError(f"'{folder}' already holds a run. Continue it with --resume, or choose another --out.")
    earlier = read_recipe(folder)
    refuse_another(recipe, earlier, folder)
    newest = _newest(folder)
    refuse_other_steps(recipe, earlier, folder, newest.step if newest else 0)
    _write_recipe(recipe, folder)
    return newest


def kept_encoder(recipe: Recipe, folder: Path) -> TextEncoder | None:
    """Read the Hugging Face encoder's files from the newest good checkpoint, so that resuming needs no other folder.

    Returns:
        None where the recipe has CLIP's text tower, or there is no checkpoint.
    """
    for checkpoint in reversed(list_checkpoints(folder)) if recipe.text.hf_model is not None else ():
        with suppress(OSError, SafetensorError, UserError), safe_open(checkpoint / WEIGHTS, "pt") as file:
            return encoder_kept_in({ENTRY: file.get_tensor(f"model.{ENTRY}")}, recipe, checkpoint)
    return None


def read_recipe(folder: Path) -> Recipe:
    """Read the resolved recipe of a run folder.

    Raises:
        UserError: there is none, or it does not fit this version.
    """
    path = folder / RECIPE
    if not path.is_file():
        raise UserError(f"'{folder}' is not a run folder: it has no {RECIPE}.")
    try:
        return load_recipe(path)
    except ValueError as error:
        reason = OLD_LAYOUT if is_old_layout(_text(path)) else str(error)
        raise UserError(
            f"'{folder}' holds no run of this version of declip. {reason} Choose another folder with --out."
        ) from error


def refuse_another(recipe: Recipe, earlier: Recipe, folder: Path) -> None:
    """Refuse to resume a run under a recipe that would change its numbers; `refuse_other_steps` judges train.steps."""
    now, then = flat(recipe.model_dump(mode="json")), flat(earlier.model_dump(mode="json"))
    changed = [key for key in sorted(now.keys() | then.keys()) if now.get(key) != then.get(key)]
    changed = [key for key in changed if key not in (*CHANGEABLE, "train.steps")]
    if changed:
        shown = "; ".join(f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in changed[:5])
        more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"'{folder}' holds the run of another recipe ('{earlier.name}'): {shown}{more}. "
            "Give the same recipe and overrides to resume, or another folder with --out."
        )


def refuse_other_steps(recipe: Recipe, earlier: Recipe, folder: Path, done: int) -> None:
    """Refuse another train.steps where the steps that are done would have had another learning rate.

    The cosine is stretched over train.steps, so only the warm-up is the same for any number of steps.
    """
    now, then = recipe.train, earlier.train
    same = recipe.head_warmup == earlier.head_warmup and done <= min(now.warmup_steps, now.steps, then.steps)
    if now.steps != then.steps and done and not same:
        raise UserError(
            f"The run in '{folder}' has done {done:,} steps of a cosine schedule over train.steps={then.steps:,}. With "
            f"train.steps={now.steps:,} they would have had other learning rates, so it cannot be resumed with that "
            f"value. To train longer, start a new run from its weights: finetune.pretrained='{folder}' "
            "train.steps=MORE --out ANOTHER_FOLDER. To finish it as it began, resume with "
            f"train.steps={then.steps}."
        )


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe next to its place and rename it: a full disk leaves no half of one."""
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
    if problems:
        if checkpoint is None:
            raise UserError(f"No checkpoint in '{folder}' is complete. {problems[0]} Start anew with another --out.")
        log.warning("Continuing from the newest good checkpoint, step %d.", checkpoint.step)
    return checkpoint


def flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Give the values of a tree, such as a recipe's, by dotted key."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        is_section = isinstance(value, dict) and value
        values |= flat(value, f"{prefix}{key}.") if is_section else {f"{prefix}{key}": value}
    return values


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file; lines that a crash or a disk damaged are left out."""
    return [row for row in map(_parse_row, _text(path).split("\n")) if row is not None]


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row to a JSONL file. JSON has no NaN and no infinity: they become null."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def drop_rows(path: Path, after: int) -> None:
    """Drop the rows of steps after one, which a resumed run takes again, and, with a warning, damaged lines."""
    if not path.exists():
        return
    damaged = [number for number, line in enumerate(_text(path).split("\n"), 1) if line and _parse_row(line) is None]
    if damaged:
        log.warning("Left out damaged lines of %s: %d, the first at line %d.", path, len(damaged), damaged[0])
    partial = path.with_suffix(".partial")
    partial.write_text("".join(_line(row) for row in read_rows(path) if row["step"] <= after), encoding="utf-8")
    partial.replace(path)


def _parse_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _number(row: Any, keys: list[str]) -> float:
    for key in keys:
        row = row.get(key) if isinstance(row, Mapping) else None
    return float("nan") if row is None else float(row)
