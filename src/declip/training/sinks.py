"""Sinks receive a run's numbers: the base class, the files of the run folder, and the progress bar."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from declip.io.progress import progress_bar
from declip.runs.folder import EVALUATIONS, METRICS, append_row, drop_rows, log

FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(message)s")


@dataclass(frozen=True)
class RunInfo:
    """The run folder, the range of steps that this process runs (`start` to `steps`), and the batch size."""

    folder: Path
    start: int
    steps: int
    batch_size: int
    quiet: bool = False


class Sink:
    """Base class of callbacks, which receive the numbers of a run on rank 0. A subclass overrides what it needs.

    A resumed run repeats the steps after its checkpoint, so a step can be logged twice, with the same numbers. An error
    that a callback raises ends the run.

    Examples:
        >>> class Losses(declip.Sink):
        ...     def log(self, step, row): print(step, "loss" in row)
        >>> options = {"data": "pairs.csv", "quiet": True, "callbacks": [Losses()]}
        >>> run = declip.train("runs/demo/recipe.yaml", {"train.steps": 1}, "runs/one", **options)
        1 True
    """

    def start(self, info: RunInfo) -> None:
        """Open the sink, before the first step."""

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Receive a row of metrics: lr, loss, losses, grad_norm, samples_per_second …, as in metrics.jsonl."""

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Receive the result of an evaluation: task, dataset and its numbers, as in evaluations.jsonl."""

    def advance(self, step: int) -> None:
        """Receive the number of a step that is not logged."""

    def flush(self) -> None:
        """Write everything to disk; called before a checkpoint, so that no checkpoint is newer than its rows."""

    def close(self) -> None:
        """Close the sink, after the last step or an error."""


class JsonLines(Sink):
    """metrics.jsonl and evaluations.jsonl. Rows of steps that a resumed run repeats are removed first."""

    def start(self, info: RunInfo) -> None:
        self.folder = info.folder
        for name in (METRICS, EVALUATIONS):
            drop_rows(self.folder / name, after=info.start)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        append_row(self.folder / METRICS, {"step": step, **values})

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        append_row(self.folder / EVALUATIONS, {"step": step, **values})

    def flush(self) -> None:
        for path in (self.folder / METRICS, self.folder / EVALUATIONS):
            if path.exists():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        raise  # a failed write is an error of the run; logging would print it and continue


class Messages(Sink):
    """log.txt: all messages."""

    def start(self, info: RunInfo) -> None:
        self._handler = _LogFile(info.folder / "log.txt", encoding="utf-8")
        self._handler.setFormatter(FORMAT)
        log.setLevel(logging.INFO)
        log.addHandler(self._handler)

    def close(self) -> None:
        log.removeHandler(self._handler)
        self._handler.close()


class Bar(Sink):
    """Standard error: messages and a progress bar, or occasional lines without a terminal."""

    def start(self, info: RunInfo) -> None:
        # On a narrow terminal the losses are truncated, never the step or the time left.
        self.progress = progress_bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}", "dim", table_column=Column(ratio=4, no_wrap=True)),
            shown=not info.quiet,
            refresh_per_second=2,
            expand=True,
        )
        done, steps = info.start, info.steps
        self.task = self.progress.add_task("training", completed=done, total=steps, speed="", losses="")
        console = self.progress.console
        self._handler: logging.Handler = RichHandler(console=console, show_path=False, markup=False)
        if not console.is_interactive:
            self._handler = logging.StreamHandler(console.file)
            self._handler.setFormatter(FORMAT)
        if not info.quiet:
            log.addHandler(self._handler)
            self.progress.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        losses = {"loss": values["loss"], **values["losses"]}
        fields: dict[str, Any] = {"losses": "  ".join(f"{name} {value:.3f}" for name, value in losses.items())}
        if values["samples_per_second"] is not None:
            fields["speed"] = f"{values['samples_per_second']:,.0f} samples/s"
        self.progress.update(self.task, completed=step, **fields)

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def close(self) -> None:
        self.progress.stop()
        log.removeHandler(self._handler)
