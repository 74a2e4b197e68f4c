"""A stored run and index, which later versions read; `python tests/fixtures/make.py stored_run` made them."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import declip
from declip.errors import UserError
from declip.interchange.read import read
from declip.runs.folder import read_rows
from fixtures.make import PAIRS, overrides

STORED = Path(__file__).parents[1] / "fixtures" / "stored_run"


@pytest.fixture
def saved(tmp_path):
    """A copy of the stored run and index, since resuming writes into a run."""
    return shutil.copytree(STORED, tmp_path / "saved")


def assert_equals(model, expected):
    with torch.no_grad():
        images = model.encode_image(model.preprocess([image for image, _ in PAIRS]))
        texts = model.encode_text(model.tokenize([text for _, text in PAIRS]))
    for found, name in ((images, "images"), (texts, "texts")):
        torch.testing.assert_close(found, torch.tensor(expected[name]), rtol=0, atol=1e-5)


def test_a_run_is_loaded_exported_and_resumed(saved, tmp_path):
    expected, run = json.loads((saved / "expected.json").read_text()), saved / "run"
    assert_equals(declip.load(run), expected)
    declip.export(run, "safetensors", tmp_path / "out")
    assert_equals(declip.load(tmp_path / "out" / "declip.safetensors"), expected)
    resumed = declip.train(
        "few-clip",
        {**overrides(), "name": "clip"},
        out=run,
        data=PAIRS,
        resume=True,
        progress=False,
        report=False,
    )
    assert resumed.steps_done == 5
    rows = read_rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[-1]["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_an_index_is_searched_and_updated(saved):
    expected = json.loads((saved / "expected.json").read_text())["hits"]
    index = declip.Index(saved / "index", model=saved / "run")
    for over, hits in expected.items():
        found = [
            (hit.key, hit.score)
            for hit in index.search("a red square", k=3, over=over, copies=True)
        ]
        assert [key for key, _ in found] == [key for key, _ in hits]
        assert [score for _, score in found] == pytest.approx(
            [score for _, score in hits], abs=1e-5
        )
    options = {"captions": True, "dtype": "float32", "device": "cpu"}
    assert len(
        declip.embed(declip.load(saved / "run"), PAIRS, out=saved / "index", **options)
    ) == len(PAIRS)


def test_files_of_a_later_layout_say_that_they_are_newer(saved):
    for path, opened in {
        saved / "index/index.json": lambda: declip.Index(saved / "index"),
        saved / "run/checkpoints/step-00000004/state.json": lambda: declip.load(saved / "run"),
    }.items():
        path.write_text(json.dumps({**json.loads(path.read_text()), "layout": 99, "more": 1}))
        with pytest.raises(
            UserError,
            match=rf"{re.escape(str(path))}' was written by a newer version.*pip install -U",
        ):
            opened()


def test_its_weights_say_where_they_are_from(monkeypatch):
    run = STORED / "run"
    assert read(run).origin == str(run)
    monkeypatch.chdir(STORED.parent)
    assert read("stored_run/run").origin == "stored_run/run"
