"""Models of other libraries with towers of their own: they start, equal the library's, train, resume and go back."""

import copy
import json
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer
from torch import nn

import declip
from conftest import refuses
from declip.closed_form.heads import Heads
from declip.fitting.adapted import Adapted
from declip.fitting.base import Base, check_linear
from declip.interchange import declip_file
from declip.interchange.read import read
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import ENTRY
from declip.models.layers import IMAGE, MARK, TEXT, blocks, depths
from declip.models.wrapped import WrappedImageTower
from declip.recipe.load import load_recipe
from declip.recipe.resolve import Facts, resolve
from declip.runs.folder import KEPT, read_rows
from declip.supervision.objective import Objective
from declip.training.assemble import assemble
from interchange.families import CAPTIONS, FAMILIES, features, saved
from interchange.towers import export_exactly, largest, pictures
from training.starts import moved, quiet_train, resumes_exactly, state, trainer_of

every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="session")
def open_family(tmp_path_factory):
    """A function from a family to its weights and the library's model."""
    folder = tmp_path_factory.mktemp("families")

    @cache
    def opened(family):
        name, library = saved(family, folder / family)
        return read(name), library

    return opened


@pytest.fixture(scope="session")
def own_file(open_family, tmp_path_factory):
    """A function from a family to a file of ours, whose model needs nothing else."""
    folder = tmp_path_factory.mktemp("files")

    @cache
    def written(family):
        path = folder / f"{family}.safetensors"
        declip_file.write_declip_file(open_family(family)[0].build(), path)
        return str(path)

    return written


def tuned(table, weights, **keys):
    train = dict.fromkeys(("checkpoint_every", "log_every", "length_buckets"), 1)
    train |= {"steps": 2, "batch_size": 8, "precision": "fp32"}
    given = {f"train.{name}": value for name, value in train.items()}
    given |= {"data.source": str(table), "data.workers": 0, "finetune.pretrained": weights}
    return load_recipe("finetune", {**given, **keys})


@every_family
def test_features_equal_the_librarys_and_the_export_goes_back(family, open_family, tmp_path):
    weights, library = open_family(family)
    model = weights.check().build().eval()
    assert isinstance(model.image_tower, WrappedImageTower)
    pixels, tokens = model.preprocess(pictures()[1:4]), model.tokenize(CAPTIONS)
    ours = model.encode_image(pixels), model.encode_text(tokens)
    short = tokens[:1, :8] if (tokens[0, 8:] == model.tokenizer.padding).all() else tokens[:1]
    torch.testing.assert_close(model.encode_text(short), ours[1][:1], atol=1e-5, rtol=0)
    theirs = features(library, pixels, tokens)
    assert max(largest(*pair) for pair in zip(ours, theirs, strict=True)) < 1e-5
    again = read(str(export_exactly(model, "open_clip", tmp_path / "out"))).build().eval()
    assert torch.equal(again.tokenize(CAPTIONS), tokens)
    torch.testing.assert_close(again.encode_text(tokens), ours[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(again.preprocess(pictures()[1:4]), pixels, atol=0, rtol=0)


def test_onnx_gives_the_same_features(open_family, one_registry, tmp_path):
    model = open_family("siglip2")[0].build().eval()
    # The exporter takes a second for each block.
    del model.image_tower.trunk.trunk.blocks[1:], model.text_tower.trunk.transformer.resblocks[1:]
    out = export_exactly(model, "onnx", tmp_path / "out")
    about = json.loads((out / "config.json").read_text())
    tokens = model.tokenize(CAPTIONS[0])[0].tolist()
    # This needs no cleaning
    ids = Tokenizer.from_file(str(out / "textual/tokenizer.json")).encode(CAPTIONS[0]).ids
    assert ids == tokens[: len(ids)]
    assert about["preprocess_cfg"]["resize_mode"] == "squash"
    assert about["logit_bias"] == model.logit_bias
    model.tokenizer.stored["zeroed"] = 1
    refuses(r"onnx: .*tokenizer.*safetensors", declip.export, model, "onnx", tmp_path / "refused")


def test_a_file_of_before_keeps_its_interpolation(open_family):
    """It stood with the wrapped model, not in the recipe."""
    weights = open_family("mobileclip2")[0]
    stored = weights.encoder
    old = replace(stored, image={"interpolation": "bilinear", "squash": False}).to_tensor()
    image = weights.recipe.image.model_copy(update={"interpolation": "bicubic"})
    recipe = weights.recipe.model_copy(update={"image": image})
    model = replace(weights, recipe=recipe, tensors={**weights.tensors, ENTRY: old}).build()
    assert model.preprocessor.filter.name == "BILINEAR"


def test_a_wrapped_model_is_known_by_what_is_stored_with_it(open_family):
    """By no name in its recipe, which a user may change."""
    weights = open_family("siglip2")[0]
    text = weights.recipe.text.model_copy(update={"hf_model": "mine"})
    renamed = replace(weights, recipe=weights.recipe.model_copy(update={"text": text}))
    assert isinstance(renamed.check().build().image_tower, WrappedImageTower)


@every_family
def test_every_parameter_has_a_gradient_and_a_layer(family, own_file):
    model = read(own_file(family)).build()
    pixels, tokens = torch.randn(3, 3, 32, 32), model.tokenize(CAPTIONS[:3])
    weighted = model.encode_image(pixels) * torch.arange(3)[:, None]
    (weighted + model.encode_text(tokens)).sum().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    assert without == {n for n, _ in model.named_parameters() if n.startswith("logit_")}
    layers = depths(model)
    assert layers.keys() == {n for n, _ in model.named_parameters() if not n.startswith("logit_")}
    assert blocks(layers, TEXT) == 2
    assert blocks(layers, IMAGE) >= 2
    stem = {n for n, depth in layers.items() if depth == 0}
    assert any(n.startswith(IMAGE) for n in stem)
    assert any("emb" in n and n.startswith(TEXT) for n in stem)
    assert not any("proj.weight" in n and "patch_embed" not in n for n in stem)


@pytest.mark.parametrize("family", ["siglip2", "mobileclip2"])  # timm, batch norm
def test_training_moves_every_parameter_and_resumes_to_the_bit(family, own_file, table, tmp_path):
    recipe, start = tuned(table, own_file(family)), read(own_file(family)).tensors
    after = resumes_exactly(recipe, tmp_path, step=1)
    losses = read_rows(tmp_path / "whole" / "metrics.jsonl")[0]["losses"]
    assert [*losses] == ["sigmoid" if "logit_bias" in start else "contrastive"]
    learned = [n for n, t in start.items() if t.is_floating_point() and "running_" not in n]
    assert [n for n in learned if torch.equal(after.weights[f"model.{n}"], start[n])] == []


@pytest.mark.parametrize("family", ["coca", "xlm-roberta"])
def test_a_run_with_adapters_is_merged_when_it_is_loaded(family, own_file, table, tmp_path):
    lora = {"finetune.lora": {"rank": 2}, "finetune.layer_decay": 1.0, "train.checkpoint_every": 2}
    trainer = trainer_of(tuned(table, own_file(family), **lora), tmp_path)
    before = state(trainer)
    learned = trainer.state.model
    trainer.train()
    adapters = {n for n in before if MARK in n}
    after = learned.state_dict()
    # Behind a ReLU some have no gradient
    assert len(moved(before, after) & adapters) > 0.9 * len(adapters)
    for name in before.keys() - adapters - {"logit_scale", "logit_bias"}:
        # peft adds to torch's attention and subtracts.
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)
    assert {f"{n.split('.')[0]}." for n in adapters} == {IMAGE, TEXT}
    loaded = declip.load(tmp_path, device="cpu")
    assert isinstance(loaded, DualEncoder)
    assert loaded.state_dict().keys() == read(own_file(family)).tensors.keys()
    pixels = loaded.preprocess(pictures()[1:4])
    assert largest(embeddings(loaded, pixels), embeddings(learned.eval(), pixels)) < 1e-5


def with_heads(weights, seed):
    """A fit of random heads to a model's embeddings."""
    generator = torch.Generator().manual_seed(seed)
    base = Base(weights.build().eval(), weights.projected, weights.origin)
    heads = torch.randn(2, 32, 32, generator=generator)
    return Adapted(base, Heads(*heads), 10.0)


def embeddings(model, pixels):
    with torch.no_grad():
        tokens = model.tokenize(CAPTIONS)
        return torch.cat([model.encode_image(pixels), model.encode_text(tokens)])


def test_heads_of_a_fit_take_the_place_of_projections_also_where_there_is_none(
    open_family, tmp_path
):
    """First in place of an identity, then of the map that open_clip builds for it."""
    weights = open_family("siglip2")[0]
    assert isinstance(weights.build().image_tower.proj, nn.Identity)
    pixels = weights.build().preprocess(pictures()[1:4])
    for seed in (1, 2):
        fitted = with_heads(weights, seed)
        check_linear(fitted.base.model, weights.origin)
        expected = embeddings(fitted, pixels)
        assert largest(expected, embeddings(fitted.base.model, pixels)) > 0.1
        file = tmp_path / f"{seed}.safetensors"
        declip_file.write_declip_file(fitted.merged(), file)
        model = declip.load(file, device="cpu")
        assert largest(embeddings(model, pixels), expected) < 1e-5
        out = export_exactly(model, "open_clip", tmp_path / f"out-{seed}")
        weights = read(str(out))
        assert largest(embeddings(weights.build().eval(), pixels), expected) < 1e-5


def test_frozen_towers_of_siglip_are_fitted(open_family, table, tmp_path):
    weights = open_family("siglip2")[0]
    run = declip.finetune(
        table, weights.origin, {"train.precision": "fp32"}, tmp_path / "run", freeze="both",
        progress=False,
    )  # fmt: skip
    pixels = weights.build().preprocess(pictures()[1:4])
    exported = declip.load(run.folder / "exported" / "open_clip", device="cpu")
    found = embeddings(declip.load(run, device="cpu"), pixels)
    assert largest(found, embeddings(exported, pixels)) < 1e-5
    origin = open_family("biomedclip")[0].origin
    refuses(
        "Sequential that is not linear.*--freeze none",
        declip.finetune, table, origin, None, tmp_path / "mlp", freeze="both", progress=False,
    )  # fmt: skip


LENGTHS = {"eva": 6, "coca": 20, "biomedclip": 24}


@pytest.mark.parametrize("family", LENGTHS)
def test_positions_are_stretched_or_cut(family, open_family, table, tmp_path):
    weights, length = open_family(family)[0], LENGTHS[family]
    recipe = tuned(table, weights.origin, **{"text.context_length": length})
    old = weights.recipe.text.context_length
    model = assemble(recipe, tmp_path / "run").model.eval()
    own, tokens = model.state_dict(), model.tokenize(CAPTIONS)
    other = [n for n, t in weights.tensors.items() if n != ENTRY and not torch.equal(own[n], t)]
    assert len(other) == (0 if family == "biomedclip" else 1)
    for name in other:
        given, rows = weights.tensors[name], []
        for row in range(length):
            at = row * (old - 1) / (length - 1) if length > old else row
            below = min(int(at), old - 2)
            rows.append((1 - at + below) * given[below] + (at - below) * given[below + 1])
        expected = torch.cat([torch.stack(rows), given[old:]])
        torch.testing.assert_close(own[name], expected, rtol=0, atol=1e-6)
    # What a resumed run starts from
    kept = declip_file.read_part(str(tmp_path / "run" / KEPT)).check()
    assert resolve(recipe, Facts(kept)).text.context_length == tokens.shape[1] == length
    assert not moved(own, kept.build().state_dict())
    again = declip.load(export_exactly(model, "open_clip", tmp_path / "out"), device="cpu")
    assert isinstance(again, DualEncoder)
    assert torch.equal(again.tokenize(CAPTIONS), tokens)
    assert largest(again.encode_text(tokens), model.encode_text(tokens)) < 1e-5


def test_positions_of_an_encoder_have_an_end(open_family, table, tmp_path):
    for family in ("biomedclip", "xlm-roberta"):
        recipe = tuned(table, open_family(family)[0].origin, **{"text.context_length": 25})
        refuses("for 24 ids. Set text.context_length", quiet_train, recipe, tmp_path / family)
        assert not (tmp_path / family).exists()


def test_losses_that_need_more_than_a_tower_gives_are_refused(open_family, table):
    weights = open_family("coca")[0]
    model = weights.build()
    asked = tuned(table, weights.origin, loss_weights={"masked_language": 1.0})
    recipe = resolve(asked, Facts(weights))
    refuses(r"views\.text\.mask", Objective, recipe, model)
    model.text_tower.gives_tokens = False
    asked = tuned(table, weights.origin, loss_weights={"late_interaction": 1.0})
    recipe = resolve(asked, Facts(weights))
    refuses(r"text_tower.*loss_weights\.late_interaction", Objective, recipe, model)


def test_a_tokenizer_that_is_missing_is_one_error(open_family, tmp_path):
    origin = open_family("siglip2")[0].origin.removeprefix("open_clip:local-dir:")
    folder = shutil.copytree(origin, tmp_path / "siglip2")
    for file in folder.glob("*token*"):
        file.unlink()
    refuses(r"tokenizer\.json", read, str(folder))


def test_a_strangers_configuration_opens_no_file_and_no_address(open_family):
    model = open_family("siglip2")[0].build().text_tower.wrapped
    config = copy.deepcopy(model.config)
    config["text_cfg"]["hf_model_name"] = "/missing"
    assert type(replace(model, config=config).build(32)[1]).__name__ == "TextTransformer"
    for name in ("hf-hub:owner/name", "local-dir:/missing"):
        config["vision_cfg"]["timm_model_name"] = name
        refuses(name, replace(model, config=config).build, 32)
