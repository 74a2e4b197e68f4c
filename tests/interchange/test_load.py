from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import declip
from conftest import draw
from declip.errors import UserError
from declip.runs.checkpoint import WEIGHTS, list_checkpoints
from declip.training.trainer import Trainer
from training.starts import recipe_for


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


def test_damaged_checkpoints_and_their_weights_alone_are_named(table: Path, tmp_path: Path) -> None:
    Trainer(recipe_for(table, steps=4), tmp_path, quiet=True).train()
    folder = list_checkpoints(tmp_path)[-1]
    with pytest.raises(UserError, match="by its folder"):
        declip.load(folder / WEIGHTS)
    for folder in list_checkpoints(tmp_path):
        (folder / WEIGHTS).write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        declip.load(tmp_path)


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
