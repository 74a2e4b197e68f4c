"""Trackers: one real offline run in each that is installed, and fakes for what needs a server or a failure."""

import json
import os
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from conftest import refuses
from declip.recipe import schema
from declip.runs.folder import METRICS, TRACKING, read_rows
from declip.training.sinks import RunInfo, open_monitor
from declip.training.trackers import AUTO, TRACKERS, trackers_of
from training.starts import quiet_train, recipe_for


def written(folder, report_to, starts=(0, 2)):
    """Steps of loss 10, 20, 30, 40 in two parts: a run that ended after its third step is resumed after its second."""
    (folder / "recipe.yaml").write_text("train: {lr: 0.5}\nloss_weights: {contrastive: 1.0}\n")
    for start in starts:
        with open_monitor(
            RunInfo(folder, start, 4, 8, progress=False), trackers_of(report_to)
        ) as monitor:
            for step in range(start + 1, min(start + 3, 4) + 1):
                monitor.log(
                    step, {"loss": 10.0 * step, "contrastive": 1.0, "grad_norm": 2.0}, 0.1, 14.0
                )
                if step == start + 2:
                    monitor.evaluation(
                        step,
                        {"dataset": "../a:b.csv", "task": "retrieval", "r1": start / 8, "n": 4},
                    )


def read_tensorboard(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars(name)
    return [(event.step, event.value) for event in events]


READERS = {"tensorboard": read_tensorboard}
"""Tracker → its steps and values of a name."""


def test_every_tracker_is_known_to_recipes_and_read_back():
    assert TRACKERS.keys() == set(schema.TRACKERS) == {*READERS, "wandb"}


@pytest.mark.parametrize("name", READERS)
def test_a_resumed_run_is_one_run_in_the_tracker(name, tmp_path):
    pytest.importorskip(TRACKERS[name].library)
    written(tmp_path, [name], starts=(0,))
    if name == "tensorboard":
        time.sleep(1)  # its files of one second have no order
    written(tmp_path, [name], starts=(2,))
    assert READERS[name](tmp_path, "train/loss") == [(1, 10.0), (2, 20.0), (3, 30.0), (4, 40.0)]
    assert READERS[name](tmp_path, "../a:b.csv/retrieval/r1") == [(2, 0.0), (4, 0.25)]


def test_wandb_writes_offline_under_the_id_that_is_kept(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    written(tmp_path, ["wandb"], starts=(0,))
    wandb.teardown()  # waits for the process that writes
    identity = json.loads((tmp_path / TRACKING).read_text())["wandb"]
    (file,) = (tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb")
    assert all(word in file.read_bytes() for word in (b"train/contrastive", b"retrieval/r1"))


def fake_wandb(log=lambda *_, **__: None):
    """A module like wandb that keeps what it is called with as `calls` and `ended`."""
    module = SimpleNamespace(calls=[], ended=[], Settings=dict)

    def init(**options):
        module.calls.append(options)
        return SimpleNamespace(log=log, finish=lambda exit_code: module.ended.append(exit_code))

    module.init = init
    return module


def test_wandb_goes_online_where_the_user_asks_and_continues_its_run(tmp_path, monkeypatch):
    rows = []
    module = fake_wandb(
        lambda numbers, step: rows.append((step, numbers.get("train/loss", numbers.get("r1"))))
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setenv("WANDB_MODE", "online")
    written(tmp_path, ["wandb"])
    first, second = module.calls
    assert first == second
    assert (first["mode"], first["resume"], first["config"]["train"]) == (
        "online",
        "allow",
        {"lr": 0.5},
    )
    assert [step for step, loss in rows if loss] == [1, 2, 3, 3, 4]
    with (
        pytest.raises(KeyError),
        open_monitor(RunInfo(tmp_path, 4, 5, 8, progress=False), trackers_of(["wandb"])),
    ):
        raise KeyError
    assert module.ended == [0, 0, 1]


def test_a_tracker_that_fails_does_not_end_the_run(table, tmp_path, monkeypatch, caplog):
    log, flush = Mock(side_effect=ConnectionError("no route")), Mock()
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(log))
    monkeypatch.setattr(TRACKERS["tensorboard"], "flush", flush)
    recipe = recipe_for(table, "clip", report_to=["wandb", "tensorboard"])
    run = quiet_train(recipe, tmp_path / "run")
    assert (run.finished, log.call_count, "no route" in caplog.text) == (True, 1, True)
    assert flush.called
    assert [row["step"] for row in read_rows(run.folder / METRICS)] == [2, 4, 6, 8]


def test_a_tracker_that_is_missing_or_cannot_start_is_refused(
    table, tmp_path, monkeypatch, command
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    words = [
        "train",
        "demo-clip",
        f"data.source={table}",
        "train.report_to=[wandb]",
        "--out",
        tmp_path / "run",
    ]
    refused = command(*words)
    assert (refused.status, "pip install 'declip[wandb]'" in refused.err) == (2, True)
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb())
    monkeypatch.delattr(sys.modules["wandb"], "init")
    recipe = recipe_for(table, "clip", report_to="wandb")
    refuses("report_to=wandb cannot start.*init", quiet_train, recipe, tmp_path / "run")
    with pytest.raises(ValueError, match=r"(?s)report_to.*'wandb'"):
        recipe_for(table, "clip", report_to=["wand"])


def test_the_default_is_tensorboard_and_looking_for_trackers_changes_no_variable(monkeypatch):
    before = dict(os.environ)
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace())
    assert [tracker.name for tracker in trackers_of([AUTO, "tensorboard", "wandb"])] == [
        "tensorboard",
        "wandb",
    ]
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert trackers_of([AUTO]) == trackers_of([]) == []
    assert dict(os.environ) == before
