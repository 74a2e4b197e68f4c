import re

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import declip
from conftest import draw, refuses
from declip.errors import UserError
from declip.interchange.read import read_checkpoint
from declip.models.image_tower import ImageTower
from declip.runs.checkpoint import WEIGHTS, list_checkpoints, step_of
from declip.training.assemble import assemble
from declip.training.trainer import Trainer
from training.starts import recipe_for


def test_a_loaded_run_gives_the_features_of_the_trained_model(table, tmp_path):
    trainer = Trainer(assemble(recipe_for(table), tmp_path, quiet=True))
    trainer.train()
    expected = trainer.parts.model.eval()
    for where in (tmp_path, list_checkpoints(tmp_path)[-1]):
        model = declip.load(where, device="cpu")
        assert not model.training
        images, words = model.preprocess([draw("red", "circle")]), model.tokenize("a red circle")
        with torch.no_grad():
            assert torch.equal(model.encode_image(images), expected.encode_image(images))
            assert torch.equal(model.encode_text(words), expected.encode_text(words))
        assert model.encode_image(images).norm(dim=-1).item() == pytest.approx(1, abs=1e-5)


def test_what_is_not_a_model_is_named(table, tmp_path):
    refuses("Cannot find the model", declip.load, tmp_path / "missing")
    refuses("not a run folder", declip.load, tmp_path)
    with pytest.raises(UserError):
        declip.load(table)
    Trainer(assemble(recipe_for(table), tmp_path / "run", quiet=True))
    refuses("no checkpoint yet", declip.load, tmp_path / "run")


def test_damaged_checkpoints_and_their_weights_alone_are_named(table, tmp_path, caplog):
    plain = recipe_for(table, steps=4, checkpoint_every=1, keep_checkpoints=4, evaluate_every=1)
    evaluation = plain.evaluation.model_copy(update={"retrieval": (str(table),)})
    train = plain.train.model_copy(update={"patience": 9})
    watched = plain.model_copy(update={"evaluation": evaluation, "train": train})
    Trainer(assemble(watched, tmp_path, quiet=True)).train()
    best = (tmp_path / "checkpoints/best").resolve()
    kept = list_checkpoints(tmp_path)
    (best / WEIGHTS).write_bytes(b"half")
    good = next(folder for folder in reversed(kept) if folder != best)
    assert read_checkpoint(tmp_path).step == step_of(good)
    assert re.search(rf"{best.name}/{WEIGHTS} is damaged.*step {step_of(good)}", caplog.text)
    folder = list_checkpoints(tmp_path)[-1]
    refuses("by its folder", declip.load, folder / WEIGHTS)
    for folder in list_checkpoints(tmp_path):
        (folder / WEIGHTS).write_bytes(b"half")
    refuses("damaged", declip.load, tmp_path)


def test_timms_image_tower_alone_gives_its_pooled_feature(tmp_path):
    trunk = timm.create_model("test_vit", num_classes=0).eval()
    save_file(trunk.state_dict(), tmp_path / "vit.safetensors")
    model = declip.load(f"timm:test_vit/{tmp_path / 'vit.safetensors'}", device="cpu")
    pixels = model.preprocess([draw("red", "circle")])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_backbone(pixels), trunk(pixels))
        torch.testing.assert_close(model.encode_image(pixels), F.normalize(trunk(pixels), dim=-1))
    refuses("image tower alone", model.tokenize, "a cat")


@pytest.mark.parametrize("change", ["more", "fewer", "statistics", "other"])
def test_timms_weights_of_another_architecture_are_refused(tmp_path, change):
    name = "test_resnet" if change == "statistics" else "test_vit"
    state = timm.create_model(name).state_dict()
    classifier = [key for key in state if key.startswith(("fc.", "head."))]
    assert classifier
    if change == "more":
        state |= {key.replace("blocks.0", "blocks.9"): t.clone() for key, t in state.items() if "blocks.0" in key}
    elif change == "other":
        state = timm.create_model("test_resnet").state_dict()
    else:
        state = {key: t for key, t in state.items() if "running_mean" not in key and "norm1.bias" not in key}
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=f"not those of {name}: (Missing|Unexpected) key") as caught:
        declip.load(f"timm:{name}/{tmp_path / 'w.safetensors'}")
    assert len(str(caught.value)) < 400
    whole = timm.create_model(name).state_dict()
    save_file(whole, tmp_path / "w.safetensors")
    declip.load(f"timm:{name}/{tmp_path / 'w.safetensors'}")


def test_a_tower_that_pools_two_tokens_gives_timms_feature():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    trunk = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=0, **options).eval()
    for parameter in trunk.parameters():
        torch.nn.init.normal_(parameter)
    sizes = {key: value for key, value in options.items() if key != "img_size"}
    tower = ImageTower("deit_tiny_distilled_patch16_224", 32, 8, sizes, weights=trunk.state_dict()).eval()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(tower.pool(pixels), trunk(pixels))
