"""The monitor of a run builds rows of numbers and passes them to the sinks."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from declip.training.sinks import Bar, JsonLines, Messages, RunInfo, Sink
from declip.training.trackers import AUTO, trackers_of


@contextmanager
def monitored(
    info: RunInfo, report_to: Sequence[str] = (AUTO,), callbacks: Sequence[Sink] = (), silent: bool = False
) -> Iterator["Monitor"]:
    """Open a run's files, bar, trackers and callbacks; nothing where `silent`, as on every rank but the first."""
    sinks = [] if silent else [Messages(), JsonLines(), Bar(), *trackers_of(report_to), *callbacks]
    with ExitStack() as started:
        for sink in sinks:
            sink.start(info)
            started.callback(sink.close)
        yield Monitor(info, sinks)


class Monitor:
    """Builds rows of numbers and passes them to sinks."""

    def __init__(self, info: RunInfo, sinks: Sequence[Sink]) -> None:
        self.info, self.sinks = info, sinks
        self._mark, self._mark_step = time.perf_counter(), info.start
        self._seconds, self._samples = 0.0, 0

    def count(self, step: int) -> None:
        """Count time and samples up to a step, before an evaluation or a checkpoint."""
        self._seconds += time.perf_counter() - self._mark
        self._samples += (step - self._mark_step) * self.info.batch_size
        self._mark_step = step
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
        self.count(step)
        seconds, samples, self._seconds, self._samples = self._seconds, self._samples, 0.0, 0
        row = {
            "samples_seen": step * self.info.batch_size,
            "lr": lr,
            "logit_scale": logit_scale,
            "loss": values["loss"],
            "losses": {name: value for name, value in values.items() if name not in ("loss", "grad_norm")},
            "grad_norm": values["grad_norm"],
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
