"""Rows of JSON and tables of the probes' results."""

import io
import json

import pytest
from rich.console import Console

from declip.evaluation.results import (
    RESULTS,
    FewShotResult,
    KNNResult,
    LinearProbeResult,
    Shots,
    SweepPoint,
    Votes,
    read_result,
    results_table,
)
from declip.io.text import percent, times

COMMON = {
    "dataset": "pets", "n": 200, "classes": 4, "train": 80, "features": "backbone", "width": 768,
    "skipped": {"truncated image": 2},
}  # fmt: skip
LINEAR = LinearProbeResult(
    **COMMON,
    metric="mean_per_class",
    top1=0.75,
    mean_per_class=0.7,
    C=0.1,
    validation="fifth of train",
    sweep=(SweepPoint(0.01, 0.5, 1.5, 30, True), SweepPoint(0.1, 0.6, 1.2, 1000, False)),
    iterations=44,
    converged=True,
)
KNN = KNNResult(**COMMON, temperature=0.07, votes=(Votes(1, 0.5, 0.5, 0.45), Votes(20, 0.6, 1.0, 0.55)))
FEW = FewShotResult(
    **COMMON,
    validation="validation split, min(shots, 4) images a class",
    runs=(Shots(1, 0.4, 0.02, (0.38, 0.42), (1.0, 10.0), 4, 0), Shots(2, 0.5, 0.01, (0.49, 0.51), (1.0, 1.0), 7, 1)),
)


@pytest.mark.parametrize("result", [LINEAR, KNN, FEW], ids=lambda result: result.task)
def test_rows_of_json_are_read_back(result) -> None:
    row = json.loads(json.dumps({"step": 7} | result.to_dict()))
    assert row["task"] == result.task
    assert row["chance"] == 0.25
    assert read_result(row) == result


def test_every_protocol_has_a_reader() -> None:
    assert set(RESULTS) == {"zero-shot", "retrieval", "linear", "knn", "few-shot"}
    assert read_result({"task": "séance"}) is None
    assert read_result({}) is None


def test_what_a_table_shows() -> None:
    def rows(result):
        return [(measure.name, measure.value, measure.chance, measure.n) for measure in result.measures()]

    assert rows(LINEAR) == [
        ("linear probe, top-1", 0.75, 0.25, 200),
        ("linear probe, mean per class", 0.7, 0.25, 200),
    ]
    assert rows(KNN) == [
        ("1-NN, top-1", 0.5, 0.25, 200),
        ("1-NN, top-5", 0.5, 1.0, 200),
        ("20-NN, top-1", 0.6, 0.25, 200),
        ("20-NN, top-5", 1.0, 1.0, 200),
    ]
    assert rows(FEW) == [
        ("1-shot, top-1", 0.4, 0.25, 200),
        ("2-shot, top-1", 0.5, 0.25, 200),
    ]
    assert [measure.label for measure in FEW.measures()] == [
        "1-shot, top-1 ± 2.0 (2 seeds)", "2-shot, top-1 ± 1.0 (2 seeds)",
    ]  # fmt: skip


def test_fractions_and_factors_keep_two_digits_or_more() -> None:
    assert [percent(value) for value in (0.367, 1 / 1285, 0.0032, 0.0)] == ["36.7 %", "0.078 %", "0.32 %", "0.00 %"]
    assert [times(value) for value in (1.44, 36.6, 1285.0)] == ["1.4", "37", "1,285"]


def test_the_table() -> None:
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(results_table([LINEAR, KNN, FEW]))
    text = console.export_text()
    for words in ("pets", "linear probe, mean per class", "70.0 %", "20-NN, top-5", "± 2.0", "2 truncated image"):
        assert words in text
