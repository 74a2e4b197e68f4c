"""Sinks: the places that a run's numbers go to. `declip.training.monitor` hands them every number."""

import logging
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.logging import RichHandler
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from declip.io.progress import LineInterval
from declip.runs.folder import EVALUATIONS, METRICS, append_row, drop_rows, log

PROGRESS = log.getChild("progress")


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
    """A place for numbers. A new one overrides what it needs and gets a line in `monitor.SINKS`.

    Raises:
        ImportError: from ``__init__``, where its library is not installed: the run goes without it.
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


class Lines(Sink):
    """log.txt and, without a terminal, standard error: messages, and a line about the step now and then."""

    def __init__(self, stretch: Stretch) -> None:
        super().__init__(stretch)
        handlers: list[logging.StreamHandler[Any]] = [_LogFile(stretch.folder / "log.txt", encoding="utf-8")]
        console = Console(stderr=True)
        if not console.is_interactive and not stretch.quiet:
            handlers.append(logging.StreamHandler(console.file))
        self._handlers = handlers
        log.setLevel(logging.INFO)
        for handler in handlers:
            handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            log.addHandler(handler)
        self._interval, self._begun = LineInterval(), time.perf_counter()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._interval.due(always=not self._interval.lines or step == self.stretch.steps):
            self._line(step, f"loss {values['loss']:.3f}  lr {values['lr']:.2e}", values["samples_per_second"])
        else:
            self.advance(step)

    def advance(self, step: int) -> None:
        # Where logged steps are far apart, a line without their numbers.
        if self._interval.due(3 if self._interval.lines else 1):
            self._line(step)

    def _line(self, step: int, numbers: str = "", speed: float | None = None) -> None:
        done, seconds = step - self.stretch.start, time.perf_counter() - self._begun
        left = timedelta(seconds=round((self.stretch.steps - step) * seconds / done))
        speed = done * self.stretch.batch_size / seconds if speed is None else speed
        words = (f"step {step:,}/{self.stretch.steps:,}", numbers, f"{speed:,.0f} samples/s", f"{left} left")
        PROGRESS.info("  ".join(filter(None, words)))

    def close(self) -> None:
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()


class _LossesColumn(ProgressColumn):
    def render(self, task: Task) -> "_Fitting":
        return _Fitting(task.fields["losses"])


@dataclass
class _Fitting:
    """As many whole losses as there is room for, the first ones."""

    losses: Sequence[str]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, cell_len("  ".join(self.losses)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = len(self.losses)
        while count and cell_len("  ".join(self.losses[:count])) > options.max_width:
            count -= 1
        yield Text("  ".join(self.losses[:count]), style="dim", no_wrap=True)


class Bar(Sink):
    """A progress bar, on a terminal only; messages appear above it."""

    def __init__(self, stretch: Stretch) -> None:
        super().__init__(stretch)
        console = Console(stderr=True, quiet=stretch.quiet)
        # On a narrow terminal the losses give way, never the step or the time left.
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            _LossesColumn(table_column=Column(ratio=4, no_wrap=True)),
            console=console,
            refresh_per_second=2,
            expand=True,
            disable=stretch.quiet or not console.is_interactive,
        )
        self.task = self.progress.add_task(
            "training", total=stretch.steps, completed=stretch.start, speed="", losses=()
        )
        self._handler = RichHandler(console=console, show_path=False, markup=False)
        self._handler.addFilter(lambda record: record.name != PROGRESS.name)  # the bar shows it
        if not self.progress.disable:
            log.addHandler(self._handler)
            self.progress.start()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        losses = {"loss": values["loss"], **values["losses"]}
        fields: dict[str, Any] = {"losses": [f"{name} {value:.3f}" for name, value in losses.items()]}
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
