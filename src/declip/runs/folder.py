"""The run folder: its files and its lock. Only this module reads the JSONL files of a run."""

import errno
import json
import logging
import os
import socket
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from declip.data.sources.pair_list import NO_LISTS, Lists, write_pair_list
from declip.errors import UserError
from declip.evaluation.results import Result, read_result
from declip.io.atomic import write_text
from declip.io.outputs import check_folder
from declip.models.hf_encoder import ENTRY, TextEncoder
from declip.models.stored import encoder_kept_in
from declip.models.wrapped import WrappedModel
from declip.recipe.load import flat
from declip.recipe.schema import Recipe, TextTowerConfig
from declip.runs.checkpoint import WEIGHTS, Checkpoint, list_checkpoints, newest_good
from declip.runs.existing import RECIPE, SPLIT, existing_run, read_recipe

METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SKIPPED = "skipped.json"
EXAMPLES = "examples.json"  # facts and example pairs for the report
TRACKING = "tracking.json"  # ids of the run in the trackers of train.report_to
# Of a fine-tuning, see `declip.finetuning`
MIXTURE = "mixture.json"
MIXED = "mixed.safetensors"
LOCK = ".lock"
KEPT = "start.safetensors"  # pretrained weights that a run started from, for resuming and for interpolation
# Recipe keys that may differ when a run is resumed, because they change no number
CHANGEABLE = (
    *("name", "data.workers", "data.max_broken_fraction", "train.device"),
    *("train.keep_checkpoints", "train.checkpoint_every", "train.report_to"),
)
log = logging.getLogger("declip")


@dataclass(frozen=True)
class Evaluated:
    """A result with the step after which it was measured, and the step of the weights, which may be an earlier one."""

    step: int
    result: Result
    weights: int


@dataclass(frozen=True)
class Run:
    """A run folder of a finished, interrupted or running run. Files are read once, when first needed.

    Attributes:
        steps_done, finished: Number of steps, and whether the run is complete, if `declip.train` returned this run.
        status: Exit status of the process if the run is not finished: 130 after Ctrl-C, 75 (try again later) after
            SIGTERM or SIGUSR1, or 0 in the latter case under torchrun.
    """

    folder: Path
    steps_done: int | None = None
    finished: bool = False
    status: int = 130
    is_rank_zero: bool = True

    @property
    def report(self) -> Path:
        """Path of the report."""
        return self.folder / "report.html"

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return read_recipe(self.folder)

    @cached_property
    def recipe_text(self) -> str:
        """Text of recipe.yaml, or an empty string."""
        return _text(self.folder / RECIPE)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl by step; if a step was logged twice, the later row."""
        rows = {row["step"]: row for row in read_rows(self.folder / METRICS)}
        return [rows[step] for step in sorted(rows)]

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Rows of evaluations.jsonl."""
        return read_rows(self.folder / EVALUATIONS)

    @cached_property
    def evaluated(self) -> list[Evaluated]:
        """Evaluations with protocols of this version, by step."""
        evaluated = []
        for row in sorted(self.evaluations, key=lambda row: int(row["step"])):
            result = read_result(row)
            step = row["step"]
            if result is not None:
                evaluated.append(Evaluated(step, result, row.get("best_step", step)))
        return evaluated

    @property
    def results(self) -> list[dict[str, Any]]:
        """Rows of evaluations.jsonl for the last step."""
        return [row for row in self.evaluations if row["step"] == self.step]

    def series(self) -> list[list[Evaluated]]:
        """The evaluations of each task on each dataset, by step."""
        groups: dict[tuple[str, str], list[Evaluated]] = {}
        for row in self.evaluated:
            groups.setdefault((row.result.dataset, row.result.task), []).append(row)
        return list(groups.values())

    def last(self) -> list[Evaluated]:
        """The last evaluation of each task on each dataset."""
        return [rows[-1] for rows in self.series()]

    @cached_property
    def skipped(self) -> dict[str, Any] | None:
        """Number of pairs "seen", and "reasons": count and example keys; None before the first checkpoint."""
        return read_json(self.folder / SKIPPED) or None

    @cached_property
    def examples(self) -> dict[str, Any]:
        """Facts for the report: "source", "losses", "view_sheet", "worst" captions; empty before the first step."""
        return read_json(self.folder / EXAMPLES)

    @cached_property
    def mixture(self) -> dict[str, Any]:
        """The fraction "alpha" of the fine-tuned weights, and "scores" of all by set; empty for other runs."""
        return read_json(self.folder / MIXTURE)

    @property
    def step(self) -> int:
        """Number of logged steps."""
        if self.steps_done is not None:
            return self.steps_done
        # A last step that was skipped has no row in metrics.jsonl.
        last = self.metrics[-1:] + self.evaluations[-1:]
        return max((int(row["step"]) for row in last), default=0)

    @property
    def best_step(self) -> int:
        """Step of the final weights: the last one, or the best one with `train.patience`."""
        return next((row["best_step"] for row in self.results if "best_step" in row), self.step)

    @property
    def seconds(self) -> float:
        """Duration of training in seconds, without evaluations and checkpoints."""
        return float(np.nansum(self.column("seconds")))

    @property
    def samples_per_second(self) -> float | None:
        """Median over the logged steps."""
        speeds = self.column("samples_per_second")
        if not np.isfinite(speeds).any():
            return None
        return float(np.nanmedian(speeds))

    @property
    def steps(self) -> np.ndarray:
        """(rows,) int64, the logged steps."""
        return np.array([row["step"] for row in self.metrics], dtype=np.int64)

    def column(self, name: str) -> np.ndarray:
        """(rows,) float64 of a metric; "losses.NAME" for a loss; NaN where a row lacks it."""
        section, _, key = name.rpartition(".")
        rows = self.metrics
        if section:
            rows = [row.get(section, {}) for row in rows]
        return np.array([row.get(key) for row in rows], dtype=np.float64)


def read_run(folder: str | Path) -> Run:
    """Open an existing run folder for reading; missing files count as empty."""
    if not Path(folder).is_dir():
        raise UserError(f"There is no run folder '{folder}'. Give the folder of a run.")
    return Run(Path(folder))


def lock_folder(folder: Path) -> FileIO:
    """Create the run folder and lock it for this process, until the returned file is closed or the process ends.

    A folder with other files is refused: a run among photographs could not be distinguished from them.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_folder(folder, RECIPE, SPLIT)
        file = (folder / LOCK).open("ab+", buffering=0)
    except OSError as error:
        raise UserError(
            f"Cannot write into '{folder}': {error.strerror}. Choose another --out."
        ) from error
    if sys.platform != "win32":
        _lock(file, folder)
    with suppress(OSError):
        # Removed since it was opened
        opened = os.fstat(file.fileno())
        there = os.stat(folder / LOCK)
        if not os.path.samestat(opened, there):
            file.close()
            return lock_folder(folder)
    with suppress(OSError):  # a full disk is reported when the run writes
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file


def _lock(file: FileIO, folder: Path) -> None:
    """Lock a file, unless its file system has no locks; raise if another process holds the lock."""
    import fcntl

    try:
        # Unlike flock's, worker processes do not inherit this lock
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return
        file.seek(0)
        holder = file.read().decode(errors="replace") or "another process"
        file.close()
        raise UserError(
            f"'{folder}' is in use: {holder} trains in it. Wait until that run ends, or choose another --out."
        ) from error


def open_folder(
    recipe: Recipe, folder: Path, resume: bool, lists: Lists = NO_LISTS
) -> Checkpoint | None:
    """Start a run in a locked folder with the lists of its split, or find the newest good checkpoint of a run in it."""
    newest = None
    if (folder / RECIPE).exists():
        if not resume:
            raise existing_run(folder)
        refuse_another(recipe, read_recipe(folder), folder)
        newest, problems = newest_good(folder)  # damaged checkpoints are passed over
        for problem in problems:
            log.warning(problem)
        if problems and newest is None:
            raise UserError(
                f"No checkpoint in '{folder}' is complete. {problems[0]} Start a new run: --out."
            )
    for path, listed in lists.items():
        write_pair_list(Path(path), listed)
    write_text(folder / RECIPE, recipe.to_yaml())
    return newest


def kept_encoder(text: TextTowerConfig, folder: Path) -> TextEncoder | WrappedModel | None:
    """Read the Hugging Face encoder, if any, from the newest good checkpoint, for resuming."""
    if text.hf_model is None:
        return None
    for checkpoint in reversed(list_checkpoints(folder)):
        with (
            suppress(OSError, SafetensorError, UserError),
            safe_open(checkpoint / WEIGHTS, "pt") as file,
        ):
            return encoder_kept_in({ENTRY: file.get_tensor(f"model.{ENTRY}")}, checkpoint)
    return None


def refuse_another(recipe: Recipe, earlier: Recipe, folder: Path) -> None:
    """Refuse to resume a run with a recipe that changes its numbers."""
    now = flat(recipe.model_dump(mode="json"))
    then = flat(earlier.model_dump(mode="json"))
    keys = sorted((now.keys() | then.keys()) - {*CHANGEABLE})
    changed = [key for key in keys if now.get(key) != then.get(key)]
    if changed:
        shown = "; ".join(f"{key} was {then.get(key)!r}, now {now.get(key)!r}" for key in changed)
        raise UserError(
            f"'{folder}' is a run of another recipe: {shown}. Resume with the same recipe and overrides, or choose "
            "another --out. To train longer, which changes the learning rates, start a new run from these weights: "
            f"finetune.pretrained='{folder}'."
        )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a JSONL file, without damaged lines."""
    rows = []
    for line in _text(path).split("\n"):
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a JSONL file; NaN and infinity, which JSON lacks, become null."""
    finite = json.loads(json.dumps(row), parse_constant=lambda _: None)
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")
    except OSError as error:
        error.filename = str(path)  # a failed write names no file
        raise


def drop_rows(path: Path, after: int) -> None:
    """Remove the rows of later steps, which a resumed run repeats, and, with a warning, damaged lines."""
    if not path.exists():
        return
    rows = read_rows(path)
    lines = [line for line in _text(path).split("\n") if line]
    damaged = len(lines) - len(rows)
    if damaged:
        log.warning("Removed %d damaged lines of %s.", damaged, path)
    kept = [json.dumps(row) + "\n" for row in rows if row["step"] <= after]
    write_text(path, "".join(kept))


def _text(path: Path) -> str:
    if not path.is_file():
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a run; empty if it is not there."""
    text = _text(path)
    if not text:
        return {}
    return dict(json.loads(text))
