"""Official and open_clip weights as files of declip, and image towers alone."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import declip
from conftest import COLOURS, SHAPES, draw, refuses
from declip.data.pair import Pair, PairSource
from declip.errors import UserError
from declip.evaluation.datasets import Dataset
from declip.interchange import official
from declip.interchange.declip_file import FILE
from golden_cases import Case, model_cases, read_official, read_state
from interchange.test_export import features, run_card
from interchange.towers import EXACT, build, export_exactly, largest
from training.starts import recipe_for


def official_file(folder, state):
    """A checkpoint as the official code saves it."""
    path = folder / "ckpt.pth.tar"
    model = {f"module.{name}": tensor.float() for name, tensor in state.items()}
    torch.save({"last_iter": 2, "model": model, "optimizer": {"state": {}}}, path)
    return path


@pytest.mark.golden
@pytest.mark.parametrize("name", model_cases())
def test_official_models_come_in_whole(name, tmp_path, command):
    file, out = official_file(tmp_path, Case(name).state), tmp_path / "out"
    assert f"Written: {out}" in command("export", file, "--format", "safetensors", "--out", out).out.replace("\n", "")
    expected, objective = read_official(file)
    read = declip.load(out, device="cpu")
    for found, own in zip(features(read), features(expected.eval()), strict=True):
        assert torch.equal(found, own)
    tensors = load_file(out / FILE)
    kept = {part.removeprefix("objective."): t for part, t in tensors.items() if part.startswith("objective.")}
    heads = {part: t for part, t in objective.state_dict().items() if ".queue." not in part}
    assert kept.keys() >= heads.keys()
    assert all(torch.equal(kept[part], heads[part]) for part in heads)
    assert "ckpt.pth.tar`" in (out / "README.md").read_text(encoding="utf-8")


def test_official_weights_are_exported_for_open_clip(tmp_path):
    """With their bias after the text projection."""
    pytest.importorskip("open_clip")
    model, _ = read_official(read_state("defilip_vit_tiny"), text_heads=2)
    assert model.text_tower.text_projection.bias.abs().max() > 0.01
    export_exactly(model.eval(), "open_clip", tmp_path / "out")


def test_home_is_expanded_wherever_a_folder_is_given(table, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    file = official_file(tmp_path, read_state("defilip_vit_tiny"))
    assert declip.export(file, "safetensors", "~/imported").folder == tmp_path / "imported"
    tuned = recipe_for(table, "clip", {"finetune": {"pretrained": "~/imported"}}, steps=1)
    declip.train(tuned, out=tmp_path / "run", quiet=True, report=False)
    declip.export("~/run", "safetensors", "~/exported")
    assert "Fine-tuned on 24 pairs" in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")


def backbone_of(state, layout):
    state = {part: t.float() for part, t in state.items() if part.startswith("visual.")}
    if layout == "bare":
        return {part.removeprefix("visual."): tensor for part, tensor in state.items()}
    return state


@pytest.mark.golden
@pytest.mark.parametrize("layout", ["named", "bare"])
@pytest.mark.parametrize("name", model_cases("declip"))
def test_an_image_tower_alone_gives_image_features(name, layout, tmp_path):
    case = Case(name)
    file = official_file(tmp_path, backbone_of(case.state, layout))
    declip.export(file, "safetensors", tmp_path / "out")
    whole, images = case.read()[0].eval(), case.batch().views["first"].pixels
    heads = official.read(str(file), image_heads=case.heads["image_heads"]).build().eval()
    with torch.no_grad():
        hidden, expected = whole.encode_backbone(images), whole.encode_image(images)
        assert largest(heads.encode_image(images), expected) <= EXACT
        assert largest(heads.encode_backbone(images), hidden) <= EXACT
        for where in (file, tmp_path / "out"):
            read = declip.load(where, device="cpu")
            assert read.encode_image(images).shape == expected.shape
    refuses(r"image tower alone.*--task linear", read.tokenize, ["a cat"])
    refuses("image tower alone", read.encode_text, torch.zeros(1, 4, dtype=torch.int64))


class Painted(PairSource):
    """Colored shapes with the color as the class."""

    name = "painted"
    class_names = COLOURS

    def __init__(self):
        self.rows = [(color, shape) for color in COLOURS for shape in SHAPES]
        self.labels = np.array([COLOURS.index(color) for color, _ in self.rows])

    def __len__(self):
        return len(self.rows)

    def captions(self, index):
        return (self.rows[index][0],)

    def __getitem__(self, index):
        return Pair(str(index), draw(*self.rows[index]), self.captions(index))


def test_probes_of_an_image_tower_alone_work_and_zero_shot_says_why_not(tmp_path, monkeypatch, capfd):
    state = read_state("defilip_vit_tiny")
    model = declip.load(official_file(tmp_path, backbone_of(state, "named")), device="cpu")
    data = Dataset("painted", {"train": Painted, "test": Painted})
    assert declip.evaluate(model, data, "linear").n == 24
    refuses("image tower alone", declip.evaluate, model, data, "zero-shot")
    with pytest.raises(UserError, match=r"cannot be exported as open_clip: it has no text tower.*onnx and safetensors"):
        declip.export(model, "open_clip", tmp_path / "out")
    declip.export(model, "safetensors", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "image tower alone" in card
    assert "image-feature-extraction" in card
    assert "torch.Size([1, 64]) torch.Size([1, 64])" in run_card(tmp_path / "out", monkeypatch, capfd)


def test_what_is_no_model_of_ours_stays_open_clips(tmp_path):
    pytest.importorskip("open_clip")
    declip.export(build("vit-clip-words"), "open_clip", tmp_path / "theirs")
    config = tmp_path / "theirs" / "open_clip_config.json"
    plain = json.loads(config.read_text())

    def load(part, **change):
        config.write_text(json.dumps({**plain, part: {**plain[part], **change}}))
        return declip.load(tmp_path / "theirs")

    refuses("resized longest", load, "preprocess_cfg", resize_mode="longest")
    refuses("AssertionError", load, "preprocess_cfg", mode="L")
    assert load("model_cfg", quick_gelu=False).recipe.text.activation == "gelu"
