"""What a run tells: progress on the terminal, metrics and evaluations as files, TensorBoard events, a log."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

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
from torch.utils.tensorboard import SummaryWriter

from declip.io.progress import LineInterval
from declip.runs.folder import EVALUATIONS, METRICS, log, parse_row, read_rows

CLOCK = ("seconds", "samples_per_second")
"""Fields of a metrics row that depend on the machine; all others repeat bit for bit."""

PROGRESS = log.getChild("progress")


class _LogFile(logging.FileHandler):
    """Hands a failed write on, as every other file of the run does, where logging would print it and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


class _TermsColumn(ProgressColumn):
    """As many whole loss terms as there is room for, the first ones."""

    def render(self, task: Task) -> "_Fitting":
        return _Fitting(task.fields["terms"])


@dataclass
class _Fitting:
    terms: Sequence[str]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(0, cell_len("  ".join(self.terms)))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = len(self.terms)
        while count and cell_len("  ".join(self.terms[:count])) > options.max_width:
            count -= 1
        yield Text("  ".join(self.terms[:count]), style="dim", no_wrap=True)


class Monitor:
    """Writes the files of a run folder and shows its progress: as a bar, or without a terminal as lines.

    The lines stand in log.txt in any case. Rows after `start` are dropped first: they belong to steps that a resumed
    run does again.

    Args:
        run: The run folder.
        start: Steps already done.
        steps: Steps in all.
        batch: Pairs a step.
        quiet: Show nothing.
    """

    def __init__(self, run: Path, start: int, steps: int, batch: int, quiet: bool = False) -> None:
        self.run, self.batch, self.start, self.steps = run, batch, start, steps
        self.console = Console(stderr=True, quiet=quiet)
        self._handlers: list[logging.Handler] = [_LogFile(run / "log.txt", encoding="utf-8")]
        if self.console.is_interactive and not quiet:
            self._handlers.append(RichHandler(console=self.console, show_path=False, markup=False))
            self._handlers[1].addFilter(lambda record: record.name != PROGRESS.name)  # the bar shows it
        elif not quiet:
            self._handlers.append(logging.StreamHandler(self.console.file))
        for handler in self._handlers:
            if not isinstance(handler, RichHandler):
                handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        # On a narrow terminal the loss terms give way, never the step or the time left.
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            _TermsColumn(table_column=Column(ratio=4, no_wrap=True)),
            console=self.console,
            refresh_per_second=2,
            expand=True,
            disable=quiet or not self.console.is_interactive,
        )
        self.task = self.progress.add_task("training", total=steps, completed=start, speed="", terms=())
        self._lines, self._begun = LineInterval(), time.perf_counter()
        self._mark, self._mark_step = time.perf_counter(), start

    def __enter__(self) -> Self:
        log.setLevel(logging.INFO)
        for handler in self._handlers:
            log.addHandler(handler)
        for name in (METRICS, EVALUATIONS):
            _keep_rows(self.run / name, self.start)
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()
        self.board.close()
        for handler in self._handlers:
            log.removeHandler(handler)
            handler.close()

    def advance(self, step: int) -> None:
        """Move the bar; where logged steps are far apart, print a line without their numbers."""
        self.progress.update(self.task, completed=step)
        if self._lines.due(3 if self._lines.lines else 1):
            self._line(step)

    def _line(self, step: int, numbers: str = "", speed: float | None = None) -> None:
        done, seconds = step - self.start, time.perf_counter() - self._begun
        left = timedelta(seconds=round((self.steps - step) * seconds / done))
        speed = done * self.batch / seconds if speed is None else speed
        words = (f"step {step:,}/{self.steps:,}", numbers, f"{speed:,.0f} samples/s", f"{left} left")
        PROGRESS.info("  ".join(filter(None, words)))

    def pause(self) -> None:
        """Leave the time until `metrics` is next called out of the speed: an evaluation or a checkpoint was made."""
        self._mark, self._mark_step = time.perf_counter(), -1

    def metrics(self, step: int, values: Mapping[str, float], learning_rate: float, logit_scale: float) -> None:
        """Write one row.

        Args:
            step: Steps done.
            values: Terms by name, "loss" and "grad_norm".
            learning_rate: Of that step.
            logit_scale: s = exp of the parameter, after that step.
        """
        terms = {name: value for name, value in values.items() if name not in {"loss", "grad_norm"}}
        now = time.perf_counter()
        seconds = now - self._mark
        done = step - self._mark_step if self._mark_step >= 0 else 0
        speed = done * self.batch / seconds if done and seconds > 0 else None
        self._mark, self._mark_step = now, step
        row = {
            "step": step,
            "samples_seen": step * self.batch,
            "lr": learning_rate,
            "logit_scale": logit_scale,
            "loss": values["loss"],
            "losses": terms,
            "grad_norm": values["grad_norm"],
            "seconds": round(seconds, 4),
            "samples_per_second": None if speed is None else round(speed, 1),
        }
        _append(self.run / METRICS, row)
        for name, value in {**values, "lr": learning_rate, "logit_scale": logit_scale}.items():
            self.board.add_scalar(f"train/{name}", value, step)
        shown = [f"{name} {value:.3f}" for name, value in {"loss": values["loss"], **terms}.items()]
        fields: dict[str, Any] = {"terms": shown}
        if self._lines.due(always=not self._lines.lines or step == self.steps):
            self._line(step, f"loss {values['loss']:.3f}  lr {learning_rate:.2e}", speed)
        if speed is not None:
            self.board.add_scalar("speed/samples_per_second", speed, step)
            fields["speed"] = f"{speed:,.0f} samples/s"
        self.progress.update(self.task, completed=step, **fields)

    def evaluation(self, step: int, row: Mapping[str, Any]) -> None:
        """Write the result of an evaluation."""
        _append(self.run / EVALUATIONS, {"step": step, **row})
        for name, value in row.items():
            if isinstance(value, float):
                self.board.add_scalar(f"{row['on']}/{row['protocol']}/{name}", value, step)

    def forget_evaluations(self, step: int) -> None:
        """Drop the results of a step that is measured again, because a crash cut its measuring short."""
        _keep_rows(self.run / EVALUATIONS, step - 1)

    def flush(self) -> None:
        """Bring the rows to the disk; called before a checkpoint, so that none is older than its rows."""
        for name in (METRICS, EVALUATIONS):
            if (self.run / name).exists():
                with (self.run / name).open("rb+") as file:
                    os.fsync(file.fileno())
        self.board.flush()


class NullMonitor(Monitor):
    """The monitor of every rank but the first: it writes and draws nothing."""

    def __init__(self, run: Path, start: int, steps: int, batch: int, quiet: bool = True) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def advance(self, step: int) -> None:
        pass

    def pause(self) -> None:
        pass

    def metrics(self, step: int, values: Mapping[str, float], learning_rate: float, logit_scale: float) -> None:
        pass

    def evaluation(self, step: int, row: Mapping[str, Any]) -> None:
        pass

    def forget_evaluations(self, step: int) -> None:
        pass

    def flush(self) -> None:
        pass


def _append(path: Path, row: Mapping[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(row))


def _line(row: Mapping[str, Any]) -> str:
    """A row as JSON, which has no NaN and no infinity: they are null."""
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _keep_rows(path: Path, last_step: int) -> None:
    """Drop the rows of later steps and, with a warning, damaged lines."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    damaged = [number for number, line in enumerate(lines, 1) if line and parse_row(line) is None]
    if damaged:
        log.warning("Left out damaged lines of %s: %d, the first at line %d.", path, len(damaged), damaged[0])
    rows = [row for row in read_rows(path) if row["step"] <= last_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(map(_line, rows)), encoding="utf-8")
    partial.replace(path)
