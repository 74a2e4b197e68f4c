"""Runs with a Hugging Face text encoder: they learn, go on, and are loaded when its folder is gone."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import declip
from conftest import WEIGHTS, refuses
from declip.api import train
from declip.interchange.declip_file import FILE, RECIPE, VERSION
from declip.models.hf_encoder import ENTRY
from declip.models.layers import TEXT, depths
from declip.recipe.schema import Recipe
from declip.runs.folder import read_run
from declip.training.assemble import assemble
from declip.training.mixture import ends_of
from declip.training.trainer import Trainer
from text_encoders import bert, roberta
from training.starts import last, moved, recipe_for, state, tuned

pytest.importorskip("transformers")

MASK, PADDING = 4, 1  # RoBERTa's


def encoder_recipe(table, folder, weights="declip", **train_keys):
    text = {"hf_model": str(folder), "context_length": 24, "pooling": "mean"}
    sections = {"text": text, "evaluation": {"final_retrieval": [str(table)]}}
    return recipe_for(table, weights, sections, log_every=1, **train_keys)


def test_it_learns_and_loads_without_its_folder(table, tmp_path):
    folder = roberta(tmp_path / "roberta")
    recipe = encoder_recipe(table, folder)
    train(recipe, out=tmp_path / "whole", quiet=True, report=False)
    shutil.rmtree(folder)
    whole = read_run(tmp_path / "whole")
    assert set(whole.metrics[0]["losses"]) == set(WEIGHTS["declip"])
    assert whole.results[0]["task"] == "retrieval"
    refuses("not a folder", train, recipe, out=tmp_path / "new", quiet=True, report=False)

    second = Trainer(assemble(tuned(table, tmp_path / "whole", {"steps": 2}), tmp_path / "second", quiet=True))
    assert not moved(last(tmp_path / "whole"), state(second)), "it is a start too"
    second.train()
    ends_of(tmp_path / "second", "cpu")

    model = declip.load(tmp_path / "whole", device="cpu")
    captions = ["a red circle", "bar painted in blue on white paper"]
    with torch.no_grad():
        expected = model.encode_text(model.tokenize(captions))
        exported = declip.export(tmp_path / "whole", "safetensors", tmp_path / "out")
        again = declip.load(exported.folder, device="cpu")
        assert torch.equal(again.encode_text(again.tokenize(captions)), expected)

    stripped = {name: tensor for name, tensor in load_file(tmp_path / "out" / FILE).items() if not name.endswith(ENTRY)}
    save_file(stripped, tmp_path / FILE, {RECIPE: recipe.to_yaml(), VERSION: "0"})
    refuses("missing or damaged", declip.load, tmp_path / FILE)


def test_frozen_blocks_of_an_encoder_rest_and_each_layer_has_its_rate(table, tmp_path):
    recipe = encoder_recipe(table, bert(tmp_path / "bert"), "clip", lr=1e-2).model_dump(mode="json")
    keys = {"lr_scale": 0.1, "layer_decay": 0.5, "freeze_text_blocks": 1}
    trainer = Trainer(assemble(Recipe.model_validate({**recipe, "finetune": keys}), tmp_path / "run", quiet=True))
    before, places = state(trainer), depths(trainer.parts.model)
    factors = {name: g["multiplier"].factor for g in trainer.parts.optimizer.param_groups for name in g["names"]}
    trainer.train()
    still = before.keys() - moved(before, last(tmp_path / "run")) - {ENTRY}
    assert still == {name for name, depth in places.items() if name.startswith(f"{TEXT}encoder.") and depth <= 1}
    assert set(factors.values()) == {0.1 * 0.5, 1.0}  # of two blocks the last is one below the top


def test_batches_are_masked_and_padded_with_the_encoders_ids(table, tmp_path):
    trainer = Trainer(assemble(encoder_recipe(table, roberta(tmp_path / "roberta")), tmp_path / "run", quiet=True))
    tokenizer = trainer.parts.model.tokenizer
    assert (tokenizer.mask, tokenizer.padding) == (MASK, PADDING)
    found = 0
    for _ in range(4):
        batch = next(trainer.loader)
        assert batch.masked is not None
        for text, masked, length in zip(batch.texts[0], batch.masked, batch.lengths[0].tolist(), strict=True):
            assert (text[0], text[length - 1]) == (tokenizer.start, tokenizer.end)
            for row in (text, masked):
                assert (row == PADDING).nonzero().flatten().tolist() == list(range(length, len(row)))
            found += int((masked == MASK).sum())
    trainer.loader.close()
    assert found > 10
