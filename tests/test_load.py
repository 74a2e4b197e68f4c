from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import declip
from conftest import draw
from declip.errors import UserError
from declip.runs.checkpoint import WEIGHTS, list_checkpoints
from declip.training.trainer import Trainer
from training.test_trainer import recipe_for


@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_loaded_run_gives_the_features_of_the_trained_model(table: Path, tmp_path: Path, ema: float | None) -> None:
    trainer = Trainer(recipe_for(table, ema=ema), tmp_path, quiet=True)
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


CLIP = ("visual.conv1.weight", "visual.proj", "logit_scale")


@pytest.mark.parametrize("text", ["token_embedding.weight", "text.token_embedding.weight", "text.transformer.x.weight"])
@pytest.mark.parametrize("start", ["", "module."])
@pytest.mark.parametrize("wrapping", [None, "state_dict", "model"])
def test_weights_of_open_clip_are_told_from_the_authors(
    text: str, start: str, wrapping: str | None, tmp_path: Path
) -> None:
    state = {f"{start}{name}": torch.zeros(1) for name in (*CLIP, text)}
    file = tmp_path / "weights.pt"
    torch.save({wrapping: state, "epoch": 1} if wrapping else state, file)
    with pytest.raises(UserError, match=f"as open_clip names them.*open_clip:MODEL/{file}.*local-dir:{tmp_path}"):
        declip.load(file)
    if wrapping is None:
        save_file(state, file.with_suffix(".safetensors"))
        with pytest.raises(UserError, match=f"as open_clip names them.*open_clip:MODEL/{tmp_path}/weights.safetensors"):
            declip.load(file.with_suffix(".safetensors"))


def test_other_weights_are_not_the_authors(tmp_path: Path) -> None:
    file = tmp_path / "weights.pt"
    for state in (
        {name: torch.zeros(1) for name in CLIP},
        {"token_embedding.weight": torch.zeros(1), "logit_scale": torch.zeros(1)},
        {"encode_text.token_embedding.weight": torch.zeros(1), "visual.proj": torch.zeros(1)},
        {"vision_model.post_layernorm.bias": torch.zeros(1), "text_model.final_layer_norm.bias": torch.zeros(1)},
        {"state_dict": torch.zeros(1)},
        [torch.zeros(1)],
    ):
        torch.save(state, file)
        with pytest.raises(UserError, match=r"not the authors' weights|not a checkpoint of the authors' code"):
            declip.load(file)
    file.write_bytes(b"half")
    with pytest.raises(UserError, match="Cannot read weights"):
        declip.load(file)


def test_the_weights_of_a_checkpoint_lead_to_its_folder(table: Path, tmp_path: Path) -> None:
    Trainer(recipe_for(table, steps=4), tmp_path, quiet=True).train()
    folder = list_checkpoints(tmp_path)[-1]
    with pytest.raises(UserError, match=f"weights of a checkpoint. Give its folder, '{folder}'"):
        declip.load(folder / WEIGHTS)
