"""Towers that OpenVINO computes: torch's features, the commands that take --engine, and what is refused."""

import faulthandler
import pickle
import signal
import sys
import threading

import pytest
import torch
from PIL import Image

import declip
from conftest import tiny_tree
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.models.inference import convert, fingerprint, image_encoder, precision_of
from declip.recipe.schema import Recipe
from text_encoders import bert

TEXTS = ["red", "a blue circle painted on white paper", "a red bar"]


def features(model, size):
    """Embeddings and pooled features of images, and embeddings of texts, three times as many as were traced."""
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = image_encoder(model)(images), model.encode_backbone(images), model.encode_text(model.tokenize(TEXTS))
    return [torch.nn.functional.normalize(each, dim=-1) for each in found]


def test_signals_arrive_after_another_thread_freed_a_model():
    assert faulthandler.is_enabled(), "handlers have a stack of their own"
    tree = tiny_tree("unused", image={"model": "declip_vit_tiny", "size": 32})
    held = [convert(DualEncoder.from_recipe(Recipe.model_validate(tree)).eval(), "fp32", "openvino")]
    thread = threading.Thread(target=held.clear)
    thread.start()
    thread.join()
    earlier = signal.signal(signal.SIGUSR1, lambda number, _: held.append(number))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, earlier)
    assert held == [signal.SIGUSR1]


@pytest.mark.parametrize(
    ("tower", "size", "depths"),
    [("resnet50_clip", 64, {"depths": [1, 1, 1, 1], "width_factor": 0.25}), ("tf_efficientnet_lite0", 64, {})],
)
def test_features_are_those_of_torch(tower, size, depths, tmp_path):
    text = {"hf_model": str(bert(tmp_path / "bert", 77))} if "lite" in tower else {}
    tree = tiny_tree("unused", image={"model": tower, "size": size, "model_kwargs": depths}, text=text)
    torch.manual_seed(0)
    model = DualEncoder.from_recipe(Recipe.model_validate(tree)).eval()
    before, identity = features(model, size), fingerprint(model)
    convert(model, "fp32", "openvino")
    assert precision_of(model) == "openvino fp32"
    assert fingerprint(model) == identity
    for own, other in zip(features(model, size), before, strict=True):
        assert float((own * other).sum(1).min()) >= 1 - 1e-5
        torch.testing.assert_close(own, other, rtol=0, atol=1e-4)
    assert model.similarity_map(Image.new("RGB", (9, 8)), "red").shape == (8, 9)
    assert "openvino_telemetry" not in sys.modules, "OpenVINO reports to its makers"


def test_precisions_and_engines_share_an_index(weights_file, folder, tmp_path, command, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    options = ("--device", "cpu", "--engine", "openvino")
    made = command("embed", weights_file, folder, "--out", tmp_path / "index", *options)
    assert (made.status, "computed in openvino bf16" in made.out) == (0, True), made.err
    exact = {"device": "cpu", "dtype": "float32", "precision": "fp32"}
    by_torch = declip.embed(weights_file, folder, out=tmp_path / "torch", **exact)
    for index, engine in ((tmp_path / "index", "torch"), (by_torch.folder, "openvino")):
        found = declip.Index.open(index, device="cpu", engine=engine).search(image=folder / "red-bar.png", k=24)
        assert next(hit.score for hit in found if hit.key == "red-bar.png") == pytest.approx(1, abs=2e-3)
    assert command("search", by_torch.folder, "a red bar", *options).status == 0
    # In the workers of other engines, whose rows become an index too
    embedder = pickle.loads(pickle.dumps(declip.Embedder(weights_file, precision="fp32", engine="openvino")))
    rows = embedder({"id": ["red-bar.png"], "image": [str(folder / "red-bar.png")]})
    assert rows["model"][0].endswith(" openvino fp32")
    expected = by_torch.vectors([by_torch.keys().index("red-bar.png")])
    torch.testing.assert_close(torch.from_numpy(rows["vector"]), expected, rtol=0, atol=1e-5)


def test_what_openvino_cannot_compute_is_refused(weights_file, folder, tmp_path, command, monkeypatch):
    model = declip.load(weights_file, "cpu")
    model.image_tower.proj = torch.nn.Sequential(model.image_tower.proj, Unknown())
    with pytest.raises(UserError, match=r"image tower.*OpenVINO.*--engine torch"):
        convert(model, "fp32", "openvino")
    with pytest.raises(UserError, match=r"cuda.*--device cpu"):
        declip.models.inference.pick_engine("openvino", torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(UserError, match=r"pip install 'declip\[openvino\]'"):
        declip.load(weights_file, engine="openvino")
    refused = command("embed", weights_file, folder, "--out", tmp_path / "index", "--engine", "openvino")
    assert (refused.status, "pip install 'declip[openvino]'" in refused.err) == (2, True)


class Unknown(torch.nn.Module):
    """A layer that OpenVINO has no operator for."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svdvals(features[:, :, None])[:, 0, None] * features
