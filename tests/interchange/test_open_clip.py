"""Models of open_clip's against open_clip itself: features, preparation, measures."""

import copy
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import declip
from conftest import draw
from declip.errors import UserError
from declip.interchange import open_clip_model as ours
from declip.interchange.export import import_weights
from interchange.tiny_open_clip import CONFIGS, WORDS, folder_of, pictures, random_model, same_weights, saved

open_clip = pytest.importorskip("open_clip")
from open_clip import factory, pretrained  # noqa: E402

pytestmark = pytest.mark.usefixtures("open_clip_configs")


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_open_clips(name: str, tmp_path: Path) -> None:
    """Of the embedding, and of the backbone: what the projection takes."""
    theirs = random_model(name)
    model = declip.load(f"open_clip:{name}/{saved(theirs, tmp_path / 'weights.safetensors')}", device="cpu")
    transform = open_clip.create_model_and_transforms(name)[2]
    tokens = open_clip.get_tokenizer(name)(WORDS)
    pixels = torch.stack([transform(picture) for picture in pictures()])
    with torch.no_grad():
        assert torch.equal(model.preprocess(pictures()), pixels)
        assert torch.equal(model.tokenize(WORDS), tokens)
        images, texts = model.encode_image(pixels), model.encode_text(tokens)
        torch.testing.assert_close(images, theirs.encode_image(pixels, normalize=True), atol=1e-6, rtol=0)
        torch.testing.assert_close(texts, theirs.encode_text(tokens, normalize=True), atol=1e-6, rtol=0)
    assert images.shape == (4, CONFIGS[name]["embed_dim"])
    assert tokens.shape == (4, CONFIGS[name]["text_cfg"]["context_length"])
    assert (images.dtype, model.training, model.device) == (torch.float32, False, torch.device("cpu"))
    torch.testing.assert_close(images.norm(dim=-1), torch.ones(4))
    tower = theirs.visual
    project = {
        "tiny-vit": lambda hidden: hidden @ tower.proj,
        "tiny-resnet": lambda hidden: tower.attnpool.c_proj(hidden),
        "tiny-coca": lambda hidden: hidden @ tower.proj,
        "tiny-mapped": lambda hidden: hidden,
        "tiny-convnext": lambda hidden: tower.head(hidden),
        "tiny-classifier": lambda hidden: tower.trunk.get_classifier()(hidden),
    }
    width = {"tiny-resnet": 256, "tiny-coca": 16, "tiny-vit": 32}.get(name, 64)
    with torch.no_grad():
        hidden = model.encode_backbone(pixels)
        expected = theirs.encode_image(pixels, normalize=False)
        torch.testing.assert_close(project[name](hidden), expected, atol=1e-5, rtol=1e-5)
        assert hidden.shape == (4, width)
        # nothing of the model is left changed
        torch.testing.assert_close(model.encode_image(pixels), torch.nn.functional.normalize(expected, dim=-1))
    assert same_weights(model, theirs)


def test_the_sizes_among_openais_tensors_are_no_damage(tmp_path: Path) -> None:
    theirs = random_model("tiny-vit")
    sizes = {name: torch.tensor(32) for name in ("input_resolution", "context_length", "vocab_size")}
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()} | sizes
    torch.save(state, tmp_path / "openai.pt")
    assert same_weights(declip.load(f"open_clip:tiny-vit/{tmp_path / 'openai.pt'}", device="cpu"), theirs)
    import_weights(f"tiny-vit/{tmp_path / 'openai.pt'}", "open_clip", tmp_path / "out")
    save_file(state | {"more": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(UserError, match=r"Cannot load .*'more'"):
        declip.load(f"open_clip:tiny-vit/{tmp_path / 'more.safetensors'}")


def test_paths_from_here_and_from_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a checkpoint of open_clip's training."""
    theirs = random_model("tiny-vit")
    saved(theirs, tmp_path / "epoch_1.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for spelling in ("epoch_1.pt", "~/epoch_1.pt"):
        assert same_weights(declip.load(f"open_clip:tiny-vit/{spelling}", device="cpu"), theirs)


def test_a_folder_brings_its_own_preparation(tmp_path: Path) -> None:
    theirs = random_model("tiny-mapped")
    how = {"mean": [0.5, 0.4, 0.3], "std": [0.5, 0.5, 0.6], "resize_mode": "squash", "interpolation": "bilinear"}
    folder = folder_of(theirs, tmp_path / "model", "tiny-mapped", how)
    model = declip.load(f"open_clip:local-dir:{folder}", device="cpu")
    transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")[2]
    assert same_weights(model, theirs)
    assert torch.equal(model.preprocess(pictures()), torch.stack([transform(picture) for picture in pictures()]))
    assert model.tokenize("red bar").shape == (1, 20)


def test_a_tag_is_fetched_and_brings_its_preparation_and_activation(tmp_path: Path, monkeypatch) -> None:
    config = copy.deepcopy(CONFIGS["tiny-vit"])
    monkeypatch.setitem(factory._MODEL_CONFIGS, "tiny-vit-quickgelu", config | {"quick_gelu": True})
    theirs = random_model("tiny-vit-quickgelu")
    file = str(saved(theirs, tmp_path / "tagged.safetensors"))
    tag = {"file": file, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.3, 0.4), "resize_mode": "squash", "quick_gelu": True}
    for name in ("tiny-vit", "tiny-vit-quickgelu"):
        monkeypatch.setitem(pretrained._PRETRAINED, name, {"first_tag": tag})
    transform = open_clip.create_model_and_transforms("tiny-vit-quickgelu", "first_tag")[2]
    pixels = torch.stack([transform(picture) for picture in pictures()])
    for given in ("tiny-vit/first_tag", "tiny-vit/First-Tag", "tiny-vit-quickgelu/first_tag"):
        model = declip.load(f"open_clip:{given}", device="cpu")
        assert torch.equal(model.preprocess(pictures()), pixels)
        with torch.no_grad():
            expected = theirs.encode_image(pixels, normalize=True)
            torch.testing.assert_close(model.encode_image(pixels), expected, atol=1e-6, rtol=0)
            text = open_clip.get_tokenizer("tiny-vit")(WORDS)
            torch.testing.assert_close(model.encode_text(text), theirs.encode_text(text, normalize=True))


def test_random_weights_are_always_the_same_and_nothing_else_changes(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    before = torch.get_rng_state()
    first, second = (declip.load("open_clip:tiny-vit/none", device="cpu") for _ in range(2))
    assert same_weights(first, second.model)
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.root.handlers == []
    assert capfd.readouterr() == ("", "")


def test_the_preprocessor_survives_pickling() -> None:
    prepare = ours.OpenClipPreprocess({"size": 32, "resize_mode": "squash"})
    assert torch.equal(pickle.loads(pickle.dumps(prepare))(pictures()), prepare(pictures()))
    assert prepare([]).shape == (0, 3, 32, 32)
    assert torch.equal(prepare(draw("red", "bar")), prepare([draw("red", "bar")]))


def test_a_very_long_picture_takes_little_memory_and_changes_nothing() -> None:
    prepare = ours.OpenClipPreprocess({"size": 32})
    ramp = np.linspace(0, 255, 900).astype(np.uint8)
    long = Image.fromarray(np.broadcast_to(ramp[None, :, None], (20, 900, 3)).copy())
    for picture in (long, long.transpose(Image.Transpose.ROTATE_90)):
        torch.testing.assert_close(prepare(picture)[0], prepare.transform(picture), atol=0.02, rtol=0)
    resized = []
    prepare.transform.transforms.insert(1, lambda image: resized.append(image.size) or image)
    prepare(Image.new("RGB", (1, 100_000)))
    assert resized == [(32, 320)]


def test_features_are_float32_whatever_the_tower_computes_in() -> None:
    model = declip.load("open_clip:tiny-vit/none", device="cpu").to(torch.bfloat16)
    pixels: Tensor = model.preprocess(pictures()).to(torch.bfloat16)
    with torch.no_grad():
        for features in (model.encode_image(pixels), model.encode_text(model.tokenize(WORDS))):
            assert features.dtype == torch.float32
            torch.testing.assert_close(features.norm(dim=-1), torch.ones(4))
        assert model.encode_backbone(pixels).dtype == torch.float32
