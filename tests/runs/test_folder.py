"""Run folders are read in whatever state they are."""

from pathlib import Path

import numpy as np

from conftest import refuses, write_rows
from declip.evaluation.results import ZeroShotResult
from declip.recipe.load import load_recipe
from declip.runs.folder import read_run, refuse_another


def _metrics(step, **more):
    row = {"step": step, "samples_seen": 10 * step, "seconds": 2.0, "samples_per_second": 100.0, "loss": 1.0}
    return row | {"losses": {"contrastive": step / 10}} | more


def test_an_empty_folder(tmp_path):
    run = read_run(tmp_path)
    assert (run.metrics, run.evaluations, run.skipped, run.recipe_text) == ([], [], None, "")
    assert (run.step, run.samples_per_second, run.seconds) == (0, None, 0.0)
    assert run.last() == []
    refuses("no run folder", read_run, tmp_path / "nowhere")


def test_metrics_by_step_the_later_row_of_a_step_wins_and_a_torn_line_is_left_out(tmp_path):
    rows = [_metrics(2), _metrics(4, samples_per_second=None), _metrics(6, samples_per_second=300.0)]
    write_rows(tmp_path / "metrics.jsonl", [*rows, _metrics(4, samples_per_second=200.0)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "pairs')
    run = read_run(tmp_path)
    assert run.steps.tolist() == [2, 4, 6]
    assert (run.step, run.samples_per_second, run.seconds) == (6, 200.0, 6.0)
    np.testing.assert_allclose(run.column("losses.contrastive"), [0.2, 0.4, 0.6])
    assert np.isnan(run.column("losses.simsiam")).all()


def test_evaluations_in_order_and_the_last_of_each(tmp_path):
    def row(step, on, top1):
        return {"step": step} | ZeroShotResult(on, 100, 10, top1, 0.5, 0.3).to_dict()

    other = {"step": 20, "dataset": "a", "task": "of another version", "top1": 0.9}
    write_rows(tmp_path / "evaluations.jsonl", [row(20, "a", 0.3), row(10, "a", 0.2), row(20, "b", 0.1), other])
    run = read_run(tmp_path)
    assert run.step == 20, "also where the last step has no metrics"
    assert [each.step for each in run.evaluated] == [10, 20, 20]
    assert [[row.step for row in rows] for rows in run.series()] == [[10, 20], [20]]
    assert [(each.result.dataset, each.result.top1) for each in run.last()] == [("a", 0.3), ("b", 0.1)]


def test_a_run_is_resumed_with_keys_that_change_no_number():
    now = {"data.max_broken_fraction": 0.5, "train.keep_checkpoints": 9}
    refuse_another(load_recipe("clip", now), load_recipe("clip"), Path("run"))
