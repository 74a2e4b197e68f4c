"""The benchmarks and the builders of tables work on toy sizes; no time is asserted."""

import json
import sys
from functools import partial
from statistics import median
from types import SimpleNamespace

import pytest

import declip
from declip.recipe.load import load_recipe
from training.starts import UNCOLORED


def test_step_and_its_peer(call):
    words = "--tiny --batch-size 4 --repeats 1 --json --precision fp32 --recipe clip"
    whole = json.loads(call("step", *words.split())[1][-1])
    found = whole["measured"]["fp32"]
    muon, adamw = (found["raw_seconds"][f"clip: {name}"] for name in ("muon", "optimizer"))
    expected = 1 + (median(muon) - median(adamw)) / found["seconds"]["clip"]
    assert whole["muon_over_adamw"]["fp32"] == pytest.approx(expected)
    for name in ("clip", "ours"):
        ratio = found["seconds"][name] / found["seconds"]["open_clip"]
        assert whole[f"{name}_over_open_clip"]["fp32"] == pytest.approx(ratio)
    assert found["text_length"]["open_clip"] == 77
    assert found["text_length"]["clip"] == -(-found["captions"]["tokens_longest_of_batch"] // 8) * 8
    assert {len(seconds) for seconds in found["raw_seconds"].values()} == {1}
    # Ours has a row of 64 for the mask token and, as the authors' weights, a bias of 32 in the text projection.
    sides = found["parameters"]
    assert sides["clip"]["model"] - sides["open_clip"]["model"] == 64 + 32


def test_search_and_its_peers(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    words = "--sizes 1200 --width 32 --batch-size 1 4 --repeats 1"
    rows = json.loads(call("search", *words.split())[1][-1])["rows"]
    assert any("sentence-transformers can't be imported" in row.get("note", "") for row in rows)
    recalls = {row["what"]: row["recall_at_10"] for row in rows if "note" not in row}
    assert min(recall for name, recall in recalls.items() if name.startswith("declip")) > 0.97


def test_starting(call, scripts, monkeypatch):
    monkeypatch.setattr(scripts("start"), "REPEATS", 1)
    rows = json.loads(call("start")[1][-1])["rows"]
    assert [row["what"] for row in rows] == ["python", "import declip", "help"]


def test_a_start_without_projections_is_not_measured_as_it_is(call, scripts, tmp_path, monkeypatch):
    data = SimpleNamespace(embedded=False)
    monkeypatch.setattr(scripts("peers_few").Data, "of", lambda *_: data)
    words = ("clipart", "--methods", "start as it is", "--out", tmp_path)
    status, printed = call("peers_few", *words)
    assert status == 2
    assert "'start as it is' requires weights with projections" in printed[-1]
    assert "--methods" in printed[-1]


TRAIN = {"optimizer": "adamw", "steps": 2, "checkpoint_every": 1, "batch_size": 8}


@pytest.fixture
def gpu(scripts, call, tmp_path, monkeypatch):
    """Measure parts of toy towers with one loss; give the exit status and what is printed."""
    module = scripts("gpu")
    keys = module.run_keys
    fewer = {"loss_weights": {"contrastive": 1.0}, "text.layers": 1, "views": UNCOLORED}
    fewer |= {f"train.{key}": value for key, value in TRAIN.items()}

    def run_keys(*given, **train):
        sharded = {"image.model_kwargs": {"depth": 1}, "train.checkpoint_every": 2}
        few = sharded if train.get("strategy") == "fsdp" else {}
        return keys(*given, **train) | fewer | few

    monkeypatch.setattr(module, "RECIPES", ("clip",))
    monkeypatch.setattr(module, "run_keys", run_keys)
    monkeypatch.setattr(module, "load_recipe", lambda name, keys: load_recipe(name, keys | fewer))
    monkeypatch.setattr(module, "draw_pairs", partial(module.draw_pairs, count=32))

    def called(*words):
        status, printed = call("gpu", "--out", tmp_path, "--device", "cpu", "--tiny", *words)
        return status, json.loads(printed[-1])

    return called


def test_embedding(call, scripts, tiny_run, monkeypatch):
    load = declip.load
    monkeypatch.setattr(scripts("embed"), "load", lambda _, *given: load(tiny_run, *given))
    words = "--towers builtin:lite0-minilm --sizes 48x40 --images 3 --repeats 1 --threads 1"
    rows = json.loads(call("embed", *words.split())[1][-1])["rows"]
    assert [(row["what"], row["count"]) for row in rows] == [
        ("declip", 3),
        ("fp32", 3),
        ("tower", 3),
    ]
    assert rows[0]["times_declip"] == 1


def test_gpu_parts_are_measured_once(gpu, call, tmp_path):
    status, printed = gpu("--only", "ViT-B-32")
    rows = printed["ViT-B-32"]["rows"]
    assert (status, [row["what"] for row in rows]) == (0, ["clip", "open_clip"])
    for row in rows:
        assert row["batch"] == 8
        assert row["samples_per_second"] * row["ms"] == pytest.approx(8000, rel=0.05)
    before = (tmp_path / "ViT-B-32.json").read_text()
    both = gpu("--only", "ViT-B-32,views")[1]
    assert (tmp_path / "ViT-B-32.json").read_text() == before
    assert both["views"]["rows"][-1] == {"what": "largest difference", "value": 0.0}
    assert call("gpu", "--out", tmp_path, "--tiny", "--only", "vit")[0] == 2
    assert call("gpu", "--out", tmp_path, "--device", "cpu")[0] == 2, "full size takes a GPU"


def test_gpu_parts_that_compare_runs_work_on_a_cpu(gpu):
    status, printed = gpu("--only", "resume,two-processes,waits,waits-of-two")
    assert (
        status,
        [row for part in printed.values() for row in part["rows"] if {"failed", "note"} & {*row}],
    ) == (
        0,
        [],
    )
    assert printed["resume"]["rows"][0]["value"] is True
    assert [row["value"] for row in printed["waits-of-two"]["rows"]] == [0]
    assert [row["value"] < 1e-3 for row in printed["two-processes"]["rows"]] == [True] * 2


def test_gpu_waits_are_those_of_a_step_of_two_processes(gpu, scripts, monkeypatch):
    def waits_of(step, cuda):
        return ["loss.py:1"] if "loss" in step() else []

    monkeypatch.setattr(scripts("gpu"), "waits_of", waits_of)
    _, printed = gpu("--only", "waits-of-two")
    (row,) = printed["waits-of-two"]["rows"]
    assert (row["value"], row["note"]) == (1, "loss.py:1")


def test_the_functions_at_which_runs_are_killed_exist(scripts):
    moments = scripts("kills").MOMENTS
    assert [
        name for name, (owner, function) in moments.items() if not hasattr(owner, function)
    ] == []
