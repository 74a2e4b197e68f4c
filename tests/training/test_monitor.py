"""The monitor and its sinks: the files of a run."""

import json
import math

import pytest

from declip.runs.folder import EVALUATIONS, METRICS, Run, read_rows
from declip.training.monitor import monitored
from declip.training.sinks import RunInfo, Sink


def test_numbers_that_are_not_finite_are_null_in_every_row(tmp_path):
    result = {"dataset": "a", "task": "retrieval", "r1": math.nan, "ranks": [1, math.inf], "by_way": {"text": math.nan}}
    for start in (0, 1):  # resuming reads the rows and writes them again
        with monitored(RunInfo(tmp_path, start, 2, 8, quiet=True)) as monitor:
            if not start:
                monitor.log(1, {"loss": math.nan, "contrastive": math.inf, "grad_norm": 2.0}, 0.1, 14.0)
                monitor.evaluation(1, result)
        for name in (METRICS, EVALUATIONS):
            json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
    (row,), (found,) = read_rows(tmp_path / METRICS), read_rows(tmp_path / EVALUATIONS)
    assert (row["loss"], row["losses"], row["grad_norm"]) == (None, {"contrastive": None}, 2.0)
    assert found == {"step": 1, **result, "r1": None, "ranks": [1, None], "by_way": {"text": None}}
    assert math.isnan(Run(tmp_path).column("losses.contrastive")[0])


def test_time_and_samples_leave_out_evaluations_and_nothing_else(tmp_path, monkeypatch):
    clock = iter([0.0, 5.0, 6.0, 7.0, 17.0, 18.0, 19.0])
    monkeypatch.setattr("declip.training.monitor.time.perf_counter", lambda: next(clock))
    with monitored(RunInfo(tmp_path, 2, 6, 8, quiet=True)) as monitor:
        monitor.restart_timer()  # at 5, after an evaluation before the first step
        monitor.count(3)  # 1 s, at 6; read again at 7
        monitor.restart_timer()  # at 17
        monitor.log(4, {"loss": 1.0, "grad_norm": 2.0}, 0.1, 14.0)  # 1 s, at 18
    (row,) = read_rows(tmp_path / METRICS)
    assert (row["seconds"], row["samples_per_second"]) == (2.0, 8.0)


def test_a_failing_sink_closes_those_before_it(tmp_path):
    class Closed(Sink):
        closed = False

        def close(self) -> None:
            self.closed = True

    class Failing(Sink):
        def start(self, info: RunInfo) -> None:
            raise OSError(info.folder)

    first = Closed()
    with pytest.raises(OSError), monitored(RunInfo(tmp_path, 0, 2, 8, quiet=True), callbacks=[first, Failing()]):
        pass
    assert first.closed
