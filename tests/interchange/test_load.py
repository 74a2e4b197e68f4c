from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import declip
from conftest import draw
from declip.errors import UserError
from declip.interchange.onnx import Encode
from declip.runs.checkpoint import WEIGHTS, list_checkpoints
from declip.training.trainer import Trainer
from interchange.towers import build
from text_encoders import bert
from training.test_trainer import recipe_for


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_loaded_run_gives_the_features_of_the_trained_model(table: Path, tmp_path: Path, ema: float | None) -> None:
    trainer = Trainer(recipe_for(table, ema_decay=ema), tmp_path, quiet=True)
    trainer.train()
    expected = trainer.evaluated_model.eval()
    for where in (tmp_path, list_checkpoints(tmp_path)[-1]):
        model = declip.load(where, device="cpu")
        assert not model.training
        images, words = model.preprocess([draw("red", "circle")]), model.tokenize("a red circle")
        with torch.no_grad():
            assert torch.equal(model.encode_image(images), expected.encode_image(images))
            assert torch.equal(model.encode_text(words), expected.encode_text(words))
        assert model.encode_image(images).norm(dim=-1).item() == pytest.approx(1, abs=1e-5)


def test_what_is_not_a_model_is_named(table: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model at"):
        declip.load(tmp_path / "missing")
    with pytest.raises(UserError, match="not a run folder"):
        declip.load(tmp_path)
    with pytest.raises(UserError):
        declip.load(table)
    Trainer(recipe_for(table), tmp_path / "run", quiet=True)
    with pytest.raises(UserError, match="no checkpoint yet"):
        declip.load(tmp_path / "run")


def test_only_damaged_checkpoints_are_named(table: Path, tmp_path: Path) -> None:
    Trainer(recipe_for(table, steps=4), tmp_path, quiet=True).train()
    for folder in list_checkpoints(tmp_path):
        (folder / WEIGHTS).write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        declip.load(tmp_path)


def test_the_weights_of_a_checkpoint_lead_to_its_folder(table: Path, tmp_path: Path) -> None:
    Trainer(recipe_for(table, steps=4), tmp_path, quiet=True).train()
    folder = list_checkpoints(tmp_path)[-1]
    with pytest.raises(UserError, match=f"weights of a checkpoint. Give its folder, '{folder}'"):
        declip.load(folder / WEIGHTS)


def test_timms_image_tower_alone_gives_its_pooled_feature(tmp_path: Path) -> None:
    trunk = timm.create_model("test_vit", num_classes=0).eval()
    save_file(trunk.state_dict(), tmp_path / "vit.safetensors")
    model = declip.load(f"timm:test_vit/{tmp_path / 'vit.safetensors'}", device="cpu")
    pixels = model.preprocess([draw("red", "circle")])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_backbone(pixels), trunk(pixels))
        torch.testing.assert_close(model.encode_image(pixels), F.normalize(trunk(pixels), dim=-1))
    with pytest.raises(UserError, match="image tower alone"):
        model.tokenize("a cat")


def test_torch_exports_a_text_encoder_that_pools_at_the_end_for_any_batch(tmp_path: Path) -> None:
    encoder = str(bert(tmp_path / "bert"))
    model = build("vit", **{"text.pooling": "eos", "text.hf_model": encoder, "text.context_length": 16})
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=16)},)
    with torch.no_grad():
        example = (model.tokenize(["a", "b"]),)
        program = torch.export.export(Encode(model, model.encode_text), example, dynamic_shapes=sizes)
        for captions in (["a red circle"], ["a", "b", "a red circle"]):
            tokens = model.tokenize(captions)
            torch.testing.assert_close(program.module()(tokens), model.encode_text(tokens))
