"""The monitor of a run: it makes rows of numbers and hands them to the sinks, the places that they go to."""

import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from declip.io.progress import progress_bar
from declip.runs.folder import EVALUATIONS, METRICS, append_row, drop_rows, log

FORMAT = logging.Formatter("%(asctime)s %(levelname)s %(message)s")

CLOCK = ("seconds", "samples_per_second")
"""Fields of a metrics row that depend on the machine; all others are bit-exact when a run is repeated."""


@dataclass(frozen=True)
class Stretch:
    """The steps that a process takes of a run.

    Attributes:
        folder: The run folder.
        start, steps: Number of steps done before, and of all steps.
        batch_size: Pairs of a step.
        quiet: Whether nothing is shown.
    """

    folder: Path
    start: int
    steps: int
    batch_size: int
    quiet: bool = False


class Sink:
    """A place for numbers. A new one overrides what it needs and gets a line in `SINKS`.

    An ImportError of ``__init__`` means that its library is not installed: the run continues without it.
    """

    def __init__(self, stretch: Stretch) -> None:
        self.stretch = stretch

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Take a row of metrics: lr, loss, losses, grad_norm, samples_per_second …; see docs/formats."""

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Take the result of an evaluation: protocol, on (the dataset), and its numbers."""

    def advance(self, step: int) -> None:
        """Note that a step is done that is not logged."""

    def flush(self) -> None:
        """Bring everything to the disk; called before a checkpoint, so that none is older than its rows."""

    def close(self) -> None:
        """Finish."""


class JsonLines(Sink):
    """metrics.jsonl and evaluations.jsonl. Rows of steps that a resumed run takes again are dropped first."""

    def __init__(self, stretch: Stretch) -> None:
        super().__init__(stretch)
        self._files = {name: stretch.folder / name for name in (METRICS, EVALUATIONS)}
        for path in self._files.values():
            drop_rows(path, after=stretch.start)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        append_row(self._files[METRICS], {"step": step, **values})

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        append_row(self._files[EVALUATIONS], {"step": step, **values})

    def flush(self) -> None:
        for path in self._files.values():
            if path.exists():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())


class _LogFile(logging.FileHandler):
    """A log file whose failed writes are errors of the run, where logging would print them and continue."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


class Messages(Sink):
    """log.txt: all messages."""

    def __init__(self, stretch: Stretch) -> None:
        super().__init__(stretch)
        self._handler = _LogFile(stretch.folder / "log.txt", encoding="utf-8")
        self._handler.setFormatter(FORMAT)
        log.setLevel(logging.INFO)
        log.addHandler(self._handler)

    def close(self) -> None:
        log.removeHandler(self._handler)
        self._handler.close()


class Bar(Sink):
    """Standard error: messages, and below them a progress bar or, without a terminal, a line now and then."""

    def __init__(self, stretch: Stretch) -> None:
        super().__init__(stretch)
        # On a narrow terminal the losses give way, never the step or the time left.
        self.progress = progress_bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}", "dim", table_column=Column(ratio=4, no_wrap=True)),
            shown=not stretch.quiet,
            refresh_per_second=2,
            expand=True,
        )
        done, steps = stretch.start, stretch.steps
        self.task = self.progress.add_task("training", completed=done, total=steps, speed="", losses="")
        console = self.progress.console
        self._handler: logging.Handler = RichHandler(console=console, show_path=False, markup=False)
        if not console.is_interactive:
            self._handler = logging.StreamHandler(console.file)
            self._handler.setFormatter(FORMAT)
        if not stretch.quiet:
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


class TensorBoard(Sink):
    """Event files for TensorBoard, where it is installed."""

    def __init__(self, stretch: Stretch) -> None:
        super().__init__(stretch)
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(stretch.folder / "tensorboard"), purge_step=stretch.start + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        train = {name: values[name] for name in ("loss", "grad_norm", "lr", "logit_scale")} | values["losses"]
        for name, value in train.items():
            self._writer.add_scalar(f"train/{name}", value, step)
        if values["samples_per_second"] is not None:
            self._writer.add_scalar("speed/samples_per_second", values["samples_per_second"], step)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, float):
                self._writer.add_scalar(f"{values['dataset']}/{values['task']}/{name}", value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


SINKS: Mapping[str, type[Sink]] = {"log": Messages, "jsonl": JsonLines, "bar": Bar, "tensorboard": TensorBoard}
"""Every sink that a run writes to, messages first. A new one is a class and a line here."""


class Monitor:
    """Makes rows of numbers and hands them to every sink of `SINKS`, from ``with`` to its end.

    A silent one has no sinks, as on every rank but the first.
    """

    def __init__(self, stretch: Stretch, silent: bool = False) -> None:
        self.stretch, self.silent = stretch, silent
        self.sinks: list[Sink] = []

    def __enter__(self) -> Self:
        for sink in SINKS.values() if not self.silent else ():
            with suppress(ImportError):
                self.sinks.append(sink(self.stretch))
        self._mark, self._mark_step = time.perf_counter(), self.stretch.start
        return self

    def __exit__(self, *_: object) -> None:
        for sink in reversed(self.sinks):
            sink.close()

    def advance(self, step: int) -> None:
        """Note that a step is done that is not logged."""
        for sink in self.sinks:
            sink.advance(step)

    def pause(self) -> None:
        """Leave the time until `log` is next called out of the speed, for an evaluation or a checkpoint."""
        self._mark, self._mark_step = time.perf_counter(), -1

    def log(self, step: int, values: Mapping[str, float], lr: float, logit_scale: float) -> None:
        """Write a row of metrics after a number of steps, with the losses by name, "loss" and "grad_norm"."""
        now = time.perf_counter()
        seconds = now - self._mark
        samples = (step - self._mark_step) * self.stretch.batch_size if self._mark_step >= 0 else 0
        self._mark, self._mark_step = now, step
        row = {
            "samples_seen": step * self.stretch.batch_size,
            "lr": lr,
            "logit_scale": logit_scale,
            "loss": values["loss"],
            "losses": {name: value for name, value in values.items() if name not in ("loss", "grad_norm")},
            "grad_norm": values["grad_norm"],
            "seconds": round(seconds, 4),
            "samples_per_second": round(samples / seconds, 1) if samples and seconds > 0 else None,
        }
        for sink in self.sinks:
            sink.log(step, row)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the result of an evaluation."""
        for sink in self.sinks:
            sink.evaluation(step, values)

    def flush(self) -> None:
        """Bring everything to the disk."""
        for sink in self.sinks:
            sink.flush()
