"""What a run tells: progress on the terminal, metrics and evaluations as files, TensorBoard events, a log."""

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from declip.runs.folder import EVALUATIONS, METRICS, log, read_rows

CLOCK = ("seconds", "samples_per_second")
"""Fields of a metrics row that depend on the machine; all others repeat bit for bit."""


class _LogFile(logging.FileHandler):
    """Hands a failed write on, as every other file of the run does, where logging would print it and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


class Monitor:
    """Writes the files of a run folder and draws its progress bar.

    Rows after `start` are dropped first: they belong to steps that a resumed run does again.

    Args:
        run: The run folder.
        start: Steps already done.
        steps: Steps in all.
        batch: Pairs a step.
        quiet: Draw nothing.
    """

    def __init__(self, run: Path, start: int, steps: int, batch: int, quiet: bool = False) -> None:
        self.run, self.batch, self.steps = run, batch, steps
        for name in (METRICS, EVALUATIONS):
            _keep_rows(run / name, start)
        self.console = Console(stderr=True, quiet=quiet)
        self._handlers: list[logging.Handler] = [_LogFile(run / "log.txt", encoding="utf-8")]
        self._handlers[0].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        if not quiet:
            self._handlers.append(RichHandler(console=self.console, show_path=False, markup=False))
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=start + 1)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[terms]}", style="dim"),
            console=self.console,
            refresh_per_second=2,
        )
        self.task = self.progress.add_task("training", total=steps, completed=start, speed="", terms="")
        self._mark, self._mark_step = time.perf_counter(), start

    def __enter__(self) -> Self:
        log.setLevel(logging.INFO)
        for handler in self._handlers:
            log.addHandler(handler)
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
        """Move the bar."""
        self.progress.update(self.task, completed=step)

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
        shown = "  ".join(f"{name} {value:.3f}" for name, value in {"loss": values["loss"], **terms}.items())
        fields: dict[str, Any] = {"terms": shown}
        if speed is not None:
            self.board.add_scalar("speed/samples_per_second", speed, step)
            fields["speed"] = f"{speed:,.0f} pairs/s"
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
    if not path.exists():
        return
    rows = [row for row in read_rows(path) if row["step"] <= last_step]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(map(_line, rows)), encoding="utf-8")
    partial.replace(path)
