"""The files that a run writes."""

import json
import math
from pathlib import Path

import pytest

from declip.training.monitor import EVALUATIONS, METRICS, Monitor, read_rows


def test_numbers_that_are_not_finite_are_null_in_every_row(tmp_path: Path) -> None:
    result = {"on": "a", "protocol": "retrieval", "r1": math.nan, "ranks": [1, math.inf], "by_way": {"text": math.nan}}
    for start in (0, 1):  # resuming reads the rows and writes them again
        with Monitor(tmp_path, start, 2, 8, quiet=True) as monitor:
            if not start:
                monitor.metrics(1, {"total": math.nan, "contrastive": math.inf, "grad_norm": 2.0}, 0.1, 14.0)
                monitor.evaluation(1, result)
        for name in (METRICS, EVALUATIONS):
            json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
    (row,), (found,) = read_rows(tmp_path / METRICS), read_rows(tmp_path / EVALUATIONS)
    assert (row["total"], row["terms"], row["grad_norm"]) == (None, {"contrastive": None}, 2.0)
    assert found == {"step": 1, **result, "r1": None, "ranks": [1, None], "by_way": {"text": None}}
