"""Training that starts from weights: what is frozen, how fast each part learns, adapters, and text encoders."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import declip
from conftest import TINY, WEIGHTS, refuses
from declip.finetuning.wise_ft import ends_of
from declip.interchange.declip_file import FILE, RECIPE, VERSION, write_declip_file
from declip.models.hf_encoder import ENTRY
from declip.models.image_tower import BatchNorm
from declip.models.layers import IMAGE, TEXT, blocks, depths, freeze, is_frozen
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint, without_prefix
from declip.runs.folder import read_run
from declip.training.optimizer import LrMultiplier, group_lr
from declip.training.parallel import SharedBatchNorm, synchronize
from interchange.test_export import features
from interchange.towers import build
from text_encoders import bert, roberta
from training.starts import VIT, last, moved, quiet_train, recipe_for, state, trainer_of, tuned


def test_towers_rest_while_new_heads_warm_up(table, tmp_path, conv_start):
    """Statistics of batch norm too."""
    file = tmp_path / "towers.safetensors"  # without heads
    write_declip_file(declip.load(conv_start, device="cpu"), file)
    keys = {"steps": 8, "checkpoint_every": 1, "keep_checkpoints": 9, "evaluate_every": 1}
    trainer = trainer_of(tuned(table, file, keys, head_warmup_steps=2), tmp_path / "run")
    before = state(trainer)
    heads = {name: tensor.clone() for name, tensor in trainer.state.objective.named_parameters()}
    trainer.train()
    assert "Steps 1 to 2 (" in (tmp_path / "run/log.txt").read_text()
    first, second, third, *_ = map(load_checkpoint, list_checkpoints(tmp_path / "run"))
    for checkpoint in (first, second):
        assert not moved(before, without_prefix("model", checkpoint.weights))
        assert moved(heads, without_prefix("objective", checkpoint.training)) == set(heads)
    assert len(moved(before, without_prefix("model", third.weights))) > 40


@pytest.mark.parametrize(("image", "text"), [(2, 3), ("all", 0)])
def test_what_is_frozen_stays_to_the_bit_and_the_rest_learns(table, tmp_path, start, image, text):
    keys = {"freeze_image_blocks": image, "freeze_text_blocks": text}
    trainer = trainer_of(tuned(table, start, {"steps": 2}, **keys), tmp_path)
    before, places = state(trainer), depths(trainer.state.model)
    trainer.train()
    frozen = {
        name
        for name, depth in places.items()
        for tower, asked in ((IMAGE, image), (TEXT, text))
        if name.startswith(tower) and (asked == "all" or (asked and depth <= asked))
    }
    assert before.keys() - moved(before, last(tmp_path)) == frozen
    assert len(frozen) > 10


def test_statistics_of_a_tower_that_learns_slowly_rest(table, tmp_path, conv_start):
    cases = [(False, {}), (True, {"layer_decay": 0.9}), (True, {"head_warmup_steps": 1})]
    for slowly, keys in (*cases, (True, {"freeze_image_blocks": "all"})):
        folder = tmp_path / "-".join(["run", *keys])
        trainer = trainer_of(tuned(table, conv_start, {"steps": 1}, **keys), folder)
        assert trainer.state.model.image_tower.has_batch_norm != slowly
        before = state(trainer)
        trainer.train()
        norms = {
            name.removesuffix(".running_mean") for name in before if name.endswith("running_mean")
        }
        changed = {name for name in moved(before, last(folder)) if name.rpartition(".")[0] in norms}
        learned = {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}
        if "freeze_image_blocks" in keys:
            assert not any(name.startswith(IMAGE) for name in moved(before, last(folder)))
        else:
            assert (changed == learned) if slowly else (changed > learned)


@pytest.mark.parametrize("asked", [1, "all"])
def test_frozen_parts_drop_nothing_though_the_rest_does(table, tmp_path, asked):
    """Stem and first block give the same twice after `train()`; what learns above them draws dropout."""
    image = {
        "image.model_kwargs": {**VIT["model_kwargs"], "pos_drop_rate": 0.5, "proj_drop_rate": 0.5}
    }
    write_declip_file(build("vit", **image), tmp_path / "vit.safetensors")
    recipe = tuned(table, tmp_path / "vit.safetensors", freeze_image_blocks=asked)
    trainer = trainer_of(recipe, tmp_path / "run")
    trainer.state.model.eval()
    trainer.state.learner.train()
    tower = trainer.state.model.image_tower
    outputs = []
    for layer in tower.trunk.blocks[:2]:
        layer.register_forward_hook(lambda _module, _input, output: outputs.append(output))
    images = torch.randn(2, 3, 32, 32)
    outputs += [tower(images).pooled, tower(images).pooled]
    same = [torch.equal(outputs[i], outputs[j]) for i, j in ((0, 2), (1, 3), (4, 5))]
    assert same == ([True, True, True] if asked == "all" else [True, False, False])


def test_frozen_batch_norm_stays_frozen_when_the_others_are_synchronized():
    model = build("conv")
    freeze(
        model,
        [name for name, depth in depths(model).items() if name.startswith(IMAGE) and depth <= 1],
    )
    every = {name for name, module in model.named_modules() if isinstance(module, BatchNorm)}
    frozen = {name for name, module in model.named_modules() if is_frozen(module)} & every
    assert 0 < len(frozen) < len(every)
    synchronize(model)
    model.train()
    norms = {name: norm for name, norm in model.named_modules() if isinstance(norm, BatchNorm)}
    assert norms.keys() == every
    for name, norm in norms.items():
        still = name in frozen
        assert is_frozen(norm) == still
        assert norm.training != still
        assert isinstance(norm, SharedBatchNorm) != still


def test_depths_count_stem_blocks_and_what_follows():
    for kind, image_blocks in (("vit", 2), ("resnet", 5), ("timm-convnext", 9), ("conv", 3)):
        model = build(kind)
        found = depths(model)
        assert found.keys() == {
            name for name, _ in model.named_parameters() if name != "logit_scale"
        }
        assert blocks(found, TEXT) == 2
        assert blocks(found, IMAGE) == image_blocks, kind
        assert (
            found["text_tower.token_embedding.weight"]
            == found["text_tower.positional_embedding"]
            == 0
        )
        assert found["text_tower.transformer.resblocks.1.mlp.c_fc.bias"] == 2
        assert (
            found["text_tower.ln_final.weight"] == found["text_tower.text_projection.weight"] == 3
        )
        assert found["image_tower.proj.weight"] == image_blocks + 1
    assert depths(build("vit"))["image_tower.trunk.pos_embed"] == 0
    assert depths(build("vit"))["image_tower.norm.weight"] == 3


def factors(trainer):
    """The rate of each parameter, relative to the recipe's."""
    return {
        name: g["multiplier"].factor
        for g in trainer.state.optimizer.param_groups
        for name in g["names"]
    }


def test_each_layer_has_its_rate(table, tmp_path, start):
    trainer = trainer_of(tuned(table, start, lr_scale=0.5, layer_decay=0.7), tmp_path)
    found, places = factors(trainer), depths(trainer.state.model)
    expected = {f"model.{name}": 0.5 * 0.7 ** (4 - place) for name, place in places.items()}
    assert found == pytest.approx(dict.fromkeys(found, 1.0) | expected, rel=1e-9)


def test_what_waits_stands_still_and_then_warms_up():
    recipe = Recipe.model_validate(TINY)
    shares = [
        group_lr(1.0, step, LrMultiplier(0.5, frozen_in_warmup=True), 3, recipe.train)
        for step in range(7)
    ]
    assert shares == [0, 0, 0, 0.25, 0.5, 0.5, 0.5]
    assert group_lr(1.0, 0, LrMultiplier(0.5), 3, recipe.train) == 0.5


def test_adapters_alone_learn_and_are_merged_when_the_run_is_loaded(table, tmp_path, conv_start):
    """On convolutions, and on the fused attention of the text tower."""
    trainer = trainer_of(tuned(table, conv_start, lora={"rank": 2, "alpha": 4}), tmp_path)
    before = state(trainer)
    trainer.train()
    changed = moved(before, last(tmp_path))
    assert {name for name in changed if ".lora_" not in name} == {"logit_scale"}
    assert changed - {"logit_scale"} == {name for name in before if ".lora_" in name}
    assert any("in_proj" in name or ".attn.lora_" in name for name in changed)
    loaded = declip.load(tmp_path, device="cpu")
    assert not any("lora" in name for name in loaded.state_dict())
    for found, expected in zip(features(loaded), features(trainer.state.model.eval()), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    given = features(declip.load(conv_start, device="cpu"))
    assert not any(
        torch.equal(found, own)
        for found, own in zip(features(loaded)[1::2], given[1::2], strict=True)
    )


def test_lora_with_a_frozen_tower_leaves_it_without_adapters(table, tmp_path, start):
    trainer = trainer_of(tuned(table, start, lora={"rank": 2}, freeze_text_blocks="all"), tmp_path)
    named = trainer.state.model.named_parameters()
    names = {name for name, parameter in named if parameter.requires_grad}
    adapters = {name for name in names if name.startswith(IMAGE) and ".lora_" in name}
    assert names == {"logit_scale"} | adapters
    assert len(adapters) > 10


MASK, PADDING = 4, 1  # RoBERTa's


def encoder_recipe(table, folder, weights="declip", **train_keys):
    text = {"hf_model": str(folder), "context_length": 24, "pooling": "mean"}
    sections = {"text": text, "evaluation": {"final_retrieval": [str(table)]}}
    return recipe_for(table, weights, sections, log_every=1, **train_keys)


def test_it_learns_and_loads_without_its_folder(table, tmp_path):
    folder = roberta(tmp_path / "roberta")
    recipe = encoder_recipe(table, folder, steps=2)
    quiet_train(recipe, tmp_path / "whole")
    shutil.rmtree(folder)
    whole = read_run(tmp_path / "whole")
    assert set(whole.metrics[0]["losses"]) == set(WEIGHTS["declip"])
    assert whole.results[0]["task"] == "retrieval"
    refuses("not a folder", quiet_train, recipe, tmp_path / "new")

    second = trainer_of(tuned(table, tmp_path / "whole", {"steps": 1}), tmp_path / "second")
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

    stripped = load_file(tmp_path / "out" / FILE)
    del stripped[next(name for name in stripped if name.endswith(ENTRY))]
    save_file(stripped, tmp_path / FILE, {RECIPE: recipe.to_yaml(), VERSION: "0"})
    refuses("missing or damaged", declip.load, tmp_path / FILE)


def test_frozen_blocks_of_an_encoder_rest_and_each_layer_has_its_rate(table, tmp_path):
    recipe = encoder_recipe(table, bert(tmp_path / "bert"), "clip", lr=1e-2, steps=2).model_dump(
        mode="json"
    )
    keys = {"lr_scale": 0.1, "layer_decay": 0.5, "freeze_text_blocks": 1}
    trainer = trainer_of(Recipe.model_validate({**recipe, "finetune": keys}), tmp_path / "run")
    before, places = state(trainer), depths(trainer.state.model)
    trainer.train()
    still = before.keys() - moved(before, last(tmp_path / "run")) - {ENTRY}
    assert still == {
        name for name, depth in places.items() if name.startswith(f"{TEXT}encoder.") and depth <= 1
    }
    assert set(factors(trainer).values()) == {
        0.1 * 0.5,
        1.0,
    }  # of two blocks the last is one below the top


def test_batches_are_masked_and_padded_with_the_encoders_ids(table, tmp_path):
    trainer = trainer_of(encoder_recipe(table, roberta(tmp_path / "roberta")), tmp_path / "run")
    tokenizer = trainer.state.model.tokenizer
    assert (tokenizer.mask, tokenizer.padding) == (MASK, PADDING)
    found = 0
    for _ in range(4):
        batch = next(trainer.loader)
        assert batch.masked is not None
        for text, masked, length in zip(
            batch.texts[0], batch.masked, batch.lengths[0].tolist(), strict=True
        ):
            assert (text[0], text[length - 1]) == (tokenizer.start, tokenizer.end)
            for row in (text, masked):
                assert (row == PADDING).nonzero().flatten().tolist() == list(
                    range(length, len(row))
                )
            found += int((masked == MASK).sum())
    trainer.loader.close()
    assert found > 10
