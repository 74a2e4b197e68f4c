"""Models of other libraries with towers of their own: they start, equal the library's, train, resume and go back."""

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import declip
from declip.api import train
from declip.errors import UserError
from declip.interchange import declip_file
from declip.interchange.read import read
from declip.interchange.weights import Weights
from declip.interchange.wrapped_weights import wrapped_in
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import IMAGE, TEXT, blocks, depths
from declip.models.lora import MARK, Adapters
from declip.models.wrapped_towers import WrappedImageTower
from declip.recipe.load import load_recipe
from declip.recipe.schema import LoRA, Recipe
from declip.runs.checkpoint import list_checkpoints, load_checkpoint
from declip.supervision.objective import Objective
from interchange.families import CAPTIONS, FAMILIES, features, saved
from interchange.towers import pictures
from training.starts import same_end

pytest.importorskip("open_clip")
pytest.importorskip("transformers")

every_family = pytest.mark.parametrize("family", FAMILIES)
RUNS = ("siglip2", "mobileclip2", "xlm-roberta", "transformers-siglip")
"""One for each way of a step: a bias and the sigmoid loss, batch norm, an encoder that masks padding, transformers."""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Weights, Any]]:
    folder = tmp_path_factory.mktemp("families")
    found = {family: saved(family, folder / family) for family in FAMILIES}
    return {family: (read(name), library) for family, (name, library) in found.items()}


def tuned(table: Path, weights: str, **keys: Any) -> Recipe:
    train = {"train.steps": 2, "train.batch_size": 8, "train.checkpoint_every": 1, "train.log_every": 1}
    given = {"data.source": str(table), "finetune.pretrained": weights, "train.precision": "fp32", "data.workers": 0}
    return load_recipe("finetune", {**given, **train, "train.length_buckets": 1, **keys})


@every_family
def test_features_equal_the_librarys_and_the_export_goes_back(family: str, families: Any, tmp_path: Path) -> None:
    weights, library = families[family]
    model = weights.check().build().eval()
    assert isinstance(model.image_tower, WrappedImageTower)
    pixels, tokens = model.preprocess(pictures()[1:4]), model.tokenize(CAPTIONS)
    with torch.no_grad():
        ours = model.encode_image(pixels), model.encode_text(tokens)
        short = tokens[:1, :8] if (tokens[0, 8:] == model.tokenizer.padding).all() else tokens[:1]
        torch.testing.assert_close(model.encode_text(short), ours[1][:1], atol=1e-5, rtol=0)
        for tower, given in ((model.image_tower, pixels), (model.text_tower, tokens)):
            assert torch.equal(tower(tower.pool(given)).pooled, tower(given).pooled)
    theirs = features(family, library, pixels, tokens)
    differences = [float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True)]
    assert max(differences) < 1e-5
    form = "huggingface" if family.startswith("transformers") else "open_clip"
    exported = declip.export(model, form, tmp_path / "out")
    assert exported.difference is not None
    assert exported.difference < 1e-5
    print(f"\n{family}: images {differences[0]:.1e}, texts {differences[1]:.1e}, export {exported.difference:.1e}")
    again = read(str(tmp_path / "out")).build().eval()
    assert torch.equal(again.tokenize(CAPTIONS), tokens)
    torch.testing.assert_close(again.encode_text(tokens), ours[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(again.preprocess(pictures()[1:4]), pixels, atol=0, rtol=0)


@every_family
def test_every_parameter_has_a_gradient_and_a_layer(family: str, families: Any, tmp_path: Path) -> None:
    """Also after our own file, whose model needs nothing else."""
    declip_file.write_declip_file(families[family][0].build(), tmp_path / declip_file.FILE)
    weights = declip_file.read(str(tmp_path))
    model = weights.build()
    pixels, tokens = torch.randn(3, 3, 32, 32), model.tokenize(CAPTIONS[:3])
    (model.encode_image(pixels) * torch.arange(3)[:, None] + model.encode_text(tokens)).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == (
        ["logit_scale", "logit_bias"] if model.logit_bias is not None else ["logit_scale"]
    )
    layers = depths(model)
    assert layers.keys() == {n for n, _ in model.named_parameters() if not n.startswith("logit_")}
    assert blocks(layers, TEXT) == 2
    assert blocks(layers, IMAGE) >= 2
    stem = {n for n, depth in layers.items() if depth == 0}
    assert any(n.startswith(IMAGE) for n in stem)
    assert any("emb" in n and n.startswith(TEXT) for n in stem)
    assert not any("proj.weight" in n and "patch_embed" not in n for n in stem)


@pytest.mark.parametrize("family", RUNS)
def test_training_moves_every_parameter_and_resumes_to_the_bit(
    family: str, families: Any, table: Path, tmp_path: Path
) -> None:
    weights = families[family][0]
    recipe, start = tuned(table, weights.origin), weights.tensors
    run = train(recipe, out=tmp_path / "whole", quiet=True, report=False)
    assert set(run.metrics[0]["losses"]) == {"sigmoid" if "logit_bias" in start else "contrastive"}
    after = load_checkpoint(list_checkpoints(tmp_path / "whole")[-1])
    assert [n for n, t in start.items() if t.is_floating_point() and torch.equal(after.weights[f"model.{n}"], t)] == []
    shutil.copytree(tmp_path / "whole", tmp_path / "parts", symlinks=True)
    shutil.rmtree(list_checkpoints(tmp_path / "parts")[-1])
    assert train(recipe, out=tmp_path / "parts", resume=True, quiet=True, report=False).finished
    same_end(tmp_path / "whole", tmp_path / "parts")


@every_family
def test_adapters_learn_and_merge(family: str, families: Any) -> None:
    model = families[family][0].build().eval()
    names, pixels, tokens = list(model.state_dict()), torch.randn(3, 3, 32, 32), model.tokenize(CAPTIONS[:3])
    adapters = Adapters(model, LoRA(rank=2))
    learning = {n: p for n, p in model.named_parameters() if MARK in n}
    with torch.no_grad():  # at first one factor is 0, and the other has no gradient
        for parameter in learning.values():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (model.encode_image(pixels) * torch.arange(3)[:, None] + model.encode_text(tokens)).sum().backward()
    assert [n for n, p in learning.items() if p.grad is None] == []
    assert sum(bool(p.grad.any()) for p in learning.values()) > 0.9 * len(learning)  # type: ignore[union-attr]  # behind a ReLU some have none
    assert {f"{n.split('.')[0]}." for n in learning} == {IMAGE, TEXT}
    with torch.no_grad():
        expected = model.encode_image(pixels), model.encode_text(tokens)
        adapters.merge()
        assert sorted(model.state_dict()) == sorted(names)
        for found, value in zip((model.encode_image(pixels), model.encode_text(tokens)), expected, strict=True):
            torch.testing.assert_close(found, value, atol=1e-5, rtol=0)


def test_a_run_with_adapters_is_loaded_again(families: Any, table: Path, tmp_path: Path) -> None:
    """Of the family whose attention is torch's fused one."""
    weights = families["coca"][0]
    recipe = tuned(table, weights.origin, **{"finetune.lora": {"rank": 2}, "finetune.layer_decay": 1.0})
    train(recipe, out=tmp_path / "run", quiet=True, report=False)
    model = declip.load(tmp_path / "run", device="cpu")
    assert isinstance(model, DualEncoder)
    key = "text_tower.trunk.transformer.resblocks.0.attn.in_proj_weight"
    assert model.state_dict().keys() == weights.tensors.keys()
    assert not torch.equal(model.state_dict()[key], weights.tensors[key])


def test_losses_that_need_more_than_a_tower_gives_are_refused(families: Any, table: Path) -> None:
    weights = families["coca"][0]
    model = weights.build()
    recipe = weights.fit(tuned(table, weights.origin, loss_weights={"masked_language": 1.0}))
    with pytest.raises(UserError, match=r"loss_weights\.masked_language"):
        Objective(recipe, model)
    model.text_tower.gives_tokens = False
    recipe = weights.fit(tuned(table, weights.origin, loss_weights={"late_interaction": 1.0}))
    with pytest.raises(UserError, match=r"text_tower.*loss_weights\.late_interaction"):
        Objective(recipe, model)


def test_a_tokenizer_that_is_missing_is_one_error(families: Any, tmp_path: Path) -> None:
    for family in ("siglip2", "transformers-siglip"):
        folder = shutil.copytree(
            Path(families[family][0].origin.removeprefix("open_clip:local-dir:")), tmp_path / family
        )
        for file in folder.glob("*token*"):
            file.unlink()
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            read(str(folder))


def test_a_strangers_configuration_opens_no_file_and_no_address(families: Any) -> None:
    model = wrapped_in(families["siglip2"][0].build())
    assert model is not None
    config = copy.deepcopy(model.config)
    config["text_cfg"]["hf_model_name"] = "/missing"
    assert type(replace(model, config=config).build(32)[1]).__name__ == "TextTransformer"
    for name in ("hf-hub:owner/name", "local-dir:/missing"):
        config["vision_cfg"]["timm_model_name"] = name
        with pytest.raises(UserError, match=name):
            replace(model, config=config).build(32)
