"""The monitor and its sinks: the files of a run, and how a sink is added or missing."""

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from declip.runs.folder import EVALUATIONS, METRICS, Run, read_rows
from declip.training import monitor as monitors
from declip.training.monitor import Monitor, Sink, Stretch


def test_numbers_that_are_not_finite_are_null_in_every_row(tmp_path: Path) -> None:
    result = {"dataset": "a", "task": "retrieval", "r1": math.nan, "ranks": [1, math.inf], "by_way": {"text": math.nan}}
    for start in (0, 1):  # resuming reads the rows and writes them again
        with Monitor(Stretch(tmp_path, start, 2, 8, quiet=True)) as monitor:
            if not start:
                monitor.log(1, {"loss": math.nan, "contrastive": math.inf, "grad_norm": 2.0}, 0.1, 14.0)
                monitor.evaluation(1, result)
        for name in (METRICS, EVALUATIONS):
            json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
    (row,), (found,) = read_rows(tmp_path / METRICS), read_rows(tmp_path / EVALUATIONS)
    assert (row["loss"], row["losses"], row["grad_norm"]) == (None, {"contrastive": None}, 2.0)
    assert found == {"step": 1, **result, "r1": None, "ranks": [1, None], "by_way": {"text": None}}
    assert math.isnan(Run(tmp_path).column("losses.contrastive")[0])


def test_a_sink_is_a_class_and_a_line_and_one_without_its_library_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []

    class Memory(Sink):
        def log(self, step: int, values: Mapping[str, Any]) -> None:
            taken.append((step, values["losses"]))

        def close(self) -> None:
            taken.append("closed")

    monkeypatch.setattr(monitors, "SINKS", {**monitors.SINKS, "memory": Memory})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Monitor(Stretch(tmp_path, 0, 2, 8, quiet=True)) as monitor:
        monitor.log(1, {"loss": 1.0, "contrastive": 1.0, "grad_norm": 2.0}, 0.1, 14.0)
    assert taken == [(1, {"contrastive": 1.0}), "closed"]
    assert not (tmp_path / "tensorboard").exists()
