"""Sinks receive a run's numbers from its monitor: files and the progress bar."""

import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from declip.io.progress import progress_bar
from declip.models.dual_encoder import DualEncoder
from declip.runs.folder import EVALUATIONS, METRICS, append_row, drop_rows, log

FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(message)s")


@dataclass(frozen=True)
class RunInfo:
    """What a callback knows of a run: folder, the steps of this process (`start` to `steps`), batch size, and model.

    The model is the one that is trained, `declip.evaluate` takes it; with train.strategy=fsdp a process holds a part.
    `terms` has the losses by name: one may hold another model to evaluate and export, such as a momentum teacher.
    """

    folder: Path
    start: int
    steps: int
    batch_size: int
    progress: bool = True
    model: DualEncoder | None = None
    terms: Mapping[str, Any] = field(default_factory=dict)


class Sink:
    """Base class of callbacks, which receive the numbers of a run on rank 0. A subclass overrides what it needs.

    A resumed run repeats the steps after its checkpoint, so a step can be logged twice, with the same numbers. An error
    that a callback raises ends the run.

    Examples:
        >>> class Losses(declip.Sink):
        ...     def log(self, step, row): print(step, "loss" in row)
        >>> options = {"data": "pairs.csv", "progress": False, "callbacks": [Losses()]}
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
        # On a narrow terminal the numbers are truncated, never the step or the time left.
        self.progress = progress_bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}", "dim", table_column=Column(ratio=8, no_wrap=True)),
            progress=info.progress,
            refresh_per_second=2,
            expand=True,
        )
        self.task = self.progress.add_task(
            "training", completed=info.start, total=info.steps, numbers=""
        )
        console = self.progress.console
        self._handler: logging.Handler = RichHandler(console=console, show_path=False, markup=False)
        if not console.is_interactive:
            self._handler = logging.StreamHandler(console.file)
            self._handler.setFormatter(FORMAT)
        if info.progress:
            log.addHandler(self._handler)
            self.progress.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        speed = values["samples_per_second"]
        losses = {"loss": values["loss"], **values["losses"]}
        numbers = [] if speed is None else [f"{speed:,.0f} samples/s"]
        numbers += [f"{name} {value:.3f}" for name, value in losses.items()]
        self.progress.update(self.task, completed=step, numbers="  ".join(numbers))

    def advance(self, step: int) -> None:
        self.progress.update(self.task, completed=step)

    def close(self) -> None:
        self.progress.stop()
        log.removeHandler(self._handler)


@contextmanager
def open_monitor(
    info: RunInfo, more: Sequence[Sink] = (), silent: bool = False
) -> Iterator["Monitor"]:
    """Open a run's files, bar and `more` sinks; nothing where `silent`, as on every rank but the first."""
    sinks = [] if silent else [Messages(), JsonLines(), Bar(), *more]
    with ExitStack() as started:
        for sink in sinks:
            sink.start(info)
            started.callback(sink.close)
        yield Monitor(info, sinks)


class Monitor:
    """Builds rows of numbers and passes them to sinks."""

    def __init__(self, info: RunInfo, sinks: Sequence[Sink]) -> None:
        self.info = info
        self.sinks = sinks
        self._seconds = 0.0
        self._logged = info.start
        self.restart_timer()

    def count(self) -> None:
        """Count the time of a step, before an evaluation or a checkpoint."""
        self._seconds += time.perf_counter() - self._mark
        self.restart_timer()

    def restart_timer(self) -> None:
        """Exclude the time since `count` from duration and speed."""
        self._mark = time.perf_counter()

    def advance(self, step: int) -> None:
        """Report a step that is not logged."""
        for sink in self.sinks:
            sink.advance(step)

    def log(self, step: int, values: Mapping[str, float], lr: float, logit_scale: float) -> None:
        """Write a row of metrics after a number of steps, with the losses by name, "loss" and "grad_norm"."""
        self.count()
        seconds = self._seconds
        samples = (step - self._logged) * self.info.batch_size
        self._seconds = 0.0
        self._logged = step
        losses = dict(values)
        loss = losses.pop("loss")
        grad_norm = losses.pop("grad_norm")
        row = {
            "samples_seen": step * self.info.batch_size,
            "lr": lr,
            "logit_scale": logit_scale,
            "loss": loss,
            "losses": losses,
            "grad_norm": grad_norm,
            "seconds": round(seconds, 4),
            "samples_per_second": round(samples / seconds, 1) if seconds > 0 else None,
        }
        for sink in self.sinks:
            sink.log(step, row)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the result of an evaluation."""
        for sink in self.sinks:
            sink.evaluation(step, values)

    def flush(self) -> None:
        """Write everything to disk."""
        for sink in self.sinks:
            sink.flush()
