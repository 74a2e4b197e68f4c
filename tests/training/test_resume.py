"""One table of recipes: a run that was stopped and resumed equals one never interrupted, bit for bit."""

import json
import shutil

import pytest

import declip
from conftest import refuses, write_rows
from declip.runs.folder import KEPT
from declip.training.assemble import assemble
from text_encoders import bert, roberta
from training.starts import quiet_train, recipe_for, resumes_exactly, stop_at, tuned


def plain(name, workers=0, **train):
    def case(table, start, folder):
        sections = {"data": {"source": str(table), "workers": workers}, "views": {}}
        return recipe_for(table, name, sections, steps=4, **train), None

    return case


def fine_tuned(**keys):
    def case(table, start, folder):
        source = shutil.copytree(start, folder / "source")
        return tuned(table, source, **keys), source

    return case


def text_encoder(make, losses, **keys):
    """Next to an image tower with random weights, without finetune.pretrained."""

    def case(table, start, folder):
        pytest.importorskip("transformers")
        text = {"hf_model": str(make(folder / "encoder")), "context_length": 24, "pooling": "mean"}
        return recipe_for(
            table, losses, {"text": text, "finetune": keys}, lr=1e-2, steps=4
        ), folder / "encoder"

    return case


CASES = {  # functions of a table, a start and a folder: a recipe, and a folder that is removed before resuming
    "defilip, Muon": plain("defilip", optimizer="muon"),
    "slip, SGD, a loader process": plain("slip", 1, optimizer="sgd"),
    "layer decay, head warm-up": fine_tuned(
        lr_scale=0.5, layer_decay=0.8, head_warmup_steps=3, freeze_text_blocks=1
    ),
    "adapters": fine_tuned(lora={"rank": 2}, head_warmup_steps=2),
    "another image size and length": fine_tuned(image_size=48, context_length=12),
    "encoder": text_encoder(roberta, "declip"),
    "encoder, adapters": text_encoder(bert, "clip", lr_scale=0.5, lora={"rank": 2, "dropout": 0.3}),
}


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_one_never_interrupted(table, start, tmp_path, name):
    recipe, removed = CASES[name](table, start, tmp_path)
    resumes_exactly(recipe, tmp_path, 2, lambda: removed and shutil.rmtree(removed))
    if removed:
        assert (tmp_path / "parts" / KEPT).is_file() == (removed.name == "source")
        declip.load(tmp_path / "parts", device="cpu")
        refuses(str(removed), assemble, recipe, tmp_path / "new")


def test_counts_of_broken_pairs_survive_a_stop(table, rows, tmp_path):
    """Of 25 pairs 12 are broken, in each step: 48 %, which are allowed."""
    broken = [{"image": f"missing-{number}.png", "caption": "lost"} for number in range(12)]
    pairs = write_rows(tmp_path / "pairs.jsonl", [*rows[:13], *broken])
    data = {"source": str(pairs), "workers": 0, "max_broken_fraction": 0.48}
    recipe = recipe_for(table, "clip", {"data": data}, steps=6, batch_size=25)
    stop_at(recipe, tmp_path / "run", 2)
    assert quiet_train(recipe, tmp_path / "run", resume=True).finished
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert skipped["seen"] == 150
    assert skipped["reasons"]["missing image"]["count"] == 72
