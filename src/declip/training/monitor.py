"""The monitor of a run: it makes rows of numbers and hands them to the sinks."""

import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Self

from declip.training.sinks import Bar, JsonLines, Lines, Sink, Stretch, TensorBoard

SINKS: Mapping[str, type[Sink]] = {
    "lines": Lines,
    "jsonl": JsonLines,
    "bar": Bar,
    "tensorboard": TensorBoard,
}
"""Every sink that a run writes to, messages first. A new one is a class and a line here."""

CLOCK = ("seconds", "samples_per_second")
"""Fields of a metrics row that depend on the machine; all others are bit-exact when a run is repeated."""


class Monitor:
    """Makes rows of numbers and hands them to every sink of `SINKS`, from ``with`` to its end.

    Args:
        stretch: The steps that are taken.
        silent: Have no sinks, as every rank but the first.
    """

    def __init__(self, stretch: Stretch, silent: bool = False) -> None:
        self.stretch, self.silent = stretch, silent
        self.sinks: dict[str, Sink] = {}

    def __enter__(self) -> Self:
        for name, sink in SINKS.items() if not self.silent else ():
            with suppress(ImportError):
                self.sinks[name] = sink(self.stretch)
        self._mark, self._mark_step = time.perf_counter(), self.stretch.start
        return self

    def __exit__(self, *_: object) -> None:
        for sink in reversed(self.sinks.values()):
            sink.close()

    def advance(self, step: int) -> None:
        """Note that a step is done that is not logged."""
        for sink in self.sinks.values():
            sink.advance(step)

    def pause(self) -> None:
        """Leave the time until `log` is next called out of the speed, for an evaluation or a checkpoint."""
        self._mark, self._mark_step = time.perf_counter(), -1

    def log(self, step: int, values: Mapping[str, float], lr: float, logit_scale: float) -> None:
        """Write a row of metrics.

        Args:
            step: Number of steps done.
            values: Losses by name, "loss" and "grad_norm".
            lr: Learning rate of that step.
            logit_scale: s = exp of the parameter, after that step.
        """
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
        for sink in self.sinks.values():
            sink.log(step, row)

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the result of an evaluation."""
        for sink in self.sinks.values():
            sink.evaluation(step, values)

    def flush(self) -> None:
        """Bring everything to the disk."""
        for sink in self.sinks.values():
            sink.flush()
