"""Models of open_clip against open_clip itself: features, preparation, and everything that cannot be loaded."""

import copy
import json
import logging
import shutil
import socket
import sys

import pytest
import torch
from huggingface_hub import constants

import declip
from conftest import Lazy, refuses
from declip.finetuning.wise_ft import ends_of
from declip.interchange import layouts
from declip.models.wrapped import WrappedImageTower
from declip.runs.checkpoint import list_checkpoints
from declip.runs.folder import KEPT
from interchange.families import (
    CONFIGS,
    WORDS,
    folder_of,
    pictures,
    random_model,
    same,
    weights_file,
)
from training.starts import quiet_train, resumes_exactly, tuned

open_clip = Lazy("open_clip")
pytestmark = pytest.mark.usefixtures("open_clip_configs")


FILES = {"tiny-vit": "epoch_1.pt"}


def transform_of(*name):
    return open_clip.create_model_and_transforms(*name)[2]


def prepares_as(model, transform):
    """Compare pictures prepared by a model and by open_clip, and give their pixels."""
    pixels = torch.stack([transform(picture) for picture in pictures()])
    torch.testing.assert_close(model.preprocess(pictures()), pixels, atol=1e-6, rtol=0)
    return pixels


@pytest.mark.parametrize("name", CONFIGS)
def test_features_are_open_clips(name, tmp_path, monkeypatch):
    """Of the embedding, and of the backbone: what the projection takes. No random number and no logger changes."""
    theirs, before = random_model(name), torch.get_rng_state()
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setenv("HOME", str(tmp_path))
    file = weights_file(theirs, tmp_path / FILES.get(name, "weights.safetensors"))
    model = declip.load(f"open_clip:{name}/~/{file.name}", device="cpu")
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.root.handlers == []
    pixels = prepares_as(model, transform_of(name))
    assert same(model, theirs)
    assert not isinstance(model.image_tower, WrappedImageTower)
    project = {
        "tiny-vit": lambda hidden: hidden @ theirs.visual.proj,
        "tiny-resnet": lambda hidden: theirs.visual.attnpool.c_proj(hidden),
        "tiny-convnext": lambda hidden: theirs.visual.head(hidden),
    }
    found = project[name](model.encode_backbone(pixels))
    expected = theirs.encode_image(pixels, normalize=False)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "section", "change", "wrapped"),
    [
        ("tiny-vit", "vision_cfg", {"pool_type": "avg"}, True),
        ("tiny-vit", "vision_cfg", {"ls_init_value": 0.1}, True),
        ("tiny-vit", "text_cfg", {"no_causal_mask": True}, True),
        ("tiny-convnext", "vision_cfg", {"timm_pool": "avg"}, False),  # as it pools anyway
    ],
)
def test_a_clip_whose_features_differ_keeps_open_clips_modules(
    name, section, change, wrapped, tmp_path, monkeypatch
):
    config = copy.deepcopy(CONFIGS[name])
    config[section] |= change
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-other", config)
    theirs = random_model("tiny-other")
    model = declip.load(
        f"open_clip:tiny-other/{weights_file(theirs, tmp_path / 'weights.pt')}", device="cpu"
    )
    assert isinstance(model.image_tower, WrappedImageTower) == wrapped
    assert same(model, theirs)


@pytest.mark.parametrize("interpolation", ["bilinear", "random"])
def test_interpolation_is_open_clips_in_evaluation_and_training(interpolation, tmp_path):
    """Also of a wrapped model, here by its resizing; "random" is bicubic in evaluation."""
    for mode in ("shortest", "squash"):
        folder = folder_of(random_model("tiny-vit"), tmp_path / mode, "tiny-vit")
        config = folder / "open_clip_config.json"
        stored = json.loads(config.read_text())
        stored["preprocess_cfg"] |= {"interpolation": interpolation, "resize_mode": mode}
        config.write_text(json.dumps(stored))
        model = declip.load(folder, device="cpu")
        prepares_as(model, transform_of(f"local-dir:{folder}"))
        assert isinstance(model.image_tower, WrappedImageTower) == (mode == "squash")
        evaluated = "bicubic" if interpolation == "random" else interpolation
        assert model.recipe.image.interpolation == evaluated


def test_captions_that_would_be_read_otherwise_are_refused(tmp_path, monkeypatch):
    config = copy.deepcopy(CONFIGS["tiny-vit"])
    config["text_cfg"]["tokenizer_kwargs"] = {"clean": "whitespace"}  # CLIP's words with capitals
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny-capitals", config)
    file = weights_file(random_model("tiny-capitals"), tmp_path / "weights.pt")
    refuses("features of captions differ", declip.load, f"open_clip:tiny-capitals/{file}")


def test_a_clip_that_cannot_be_converted_keeps_open_clips_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "image_layout", lambda state: layouts.CLIP_RESNET)
    theirs = random_model("tiny-vit")
    model = declip.load(
        f"open_clip:tiny-vit/{weights_file(theirs, tmp_path / 'weights.pt')}", device="cpu"
    )
    assert isinstance(model.image_tower, WrappedImageTower)
    assert same(model, theirs)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"positional_embedding": torch.zeros(20, 32)},
            r"'positional_embedding' has shape \(20, 32\) instead of",
        ),
        (
            {"visual.positional_embedding": torch.zeros(65, 32)},
            r"positional_embedding' has shape \(65, 32\) instead",
        ),
        ({"more": torch.zeros(2)}, 'Cannot load .*"more"'),
    ],
)
def test_tensors_of_another_model_are_refused(tmp_path, change, said):
    torch.save(random_model("tiny-vit").state_dict() | change, tmp_path / "other.pt")
    refuses(said, declip.load, f"open_clip:tiny-vit/{tmp_path / 'other.pt'}")


def test_a_tag_brings_its_preparation_and_activation(tmp_path, monkeypatch):
    config = copy.deepcopy(CONFIGS["tiny-vit"])
    monkeypatch.setitem(
        open_clip.factory._MODEL_CONFIGS, "tiny-vit-quickgelu", config | {"quick_gelu": True}
    )
    theirs = random_model("tiny-vit-quickgelu")
    file = str(weights_file(theirs, tmp_path / "tagged.safetensors"))
    tag = {
        "file": file,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.2, 0.3, 0.4),
        "resize_mode": "squash",
        "quick_gelu": True,
    }
    for name in ("tiny-vit", "tiny-vit-quickgelu"):
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, {"first_tag": tag})
    transform = transform_of("tiny-vit-quickgelu", "first_tag")
    for given in ("tiny-vit/first_tag", "tiny-vit/First-Tag", "tiny-vit-quickgelu/first_tag"):
        model = declip.load(f"open_clip:{given}", device="cpu")
        prepares_as(model, transform)
        assert torch.equal(model.tokenize(WORDS), open_clip.get_tokenizer("tiny-vit")(WORDS))
        assert same(model, theirs)


def test_a_run_from_published_weights_keeps_no_copy_of_them(table, tmp_path, monkeypatch):
    file = weights_file(random_model("tiny-vit"), tmp_path / "tagged.safetensors")
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "tiny-vit", {"first_tag": {"file": str(file)}}
    )
    recipe = tuned(table, "open_clip:tiny-vit/first_tag", {"steps": 2, "checkpoint_every": 1})
    resumes_exactly(recipe, tmp_path, step=1)
    assert not (tmp_path / "whole" / KEPT).exists()
    first, last = ends_of(tmp_path / "whole", "cpu")
    assert same(first, random_model("tiny-vit"))
    assert not same(last, random_model("tiny-vit"))
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", {})
    shutil.rmtree(list_checkpoints(tmp_path / "parts")[-1])
    refuses("first_tag", quiet_train, recipe, tmp_path / "parts", resume=True)  # gone


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("ViT-B-31/openai", "Unknown open_clip model 'ViT-B-31'. Did you mean 'ViT-B-32'"),
        ("ViT-B-32", r"does not say which weights.*Tags: openai, .*laion2b_s34b_b79k"),
        ("ViT-B-32/opneai", "no tag or file 'opneai'.*Tags: openai"),
        ("tiny-vit//missing/weights", "no tag or file '/missing/weights'.*Tags: none"),
        ("local-dir:/missing", "'/missing'.*open_clip_config.json"),
    ],
)
def test_wrong_names(given, message):
    refuses(message, declip.load, f"open_clip:{given}")


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_refused(tmp_path, monkeypatch):
    file = tmp_path / "program.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    monkeypatch.setattr(
        torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load was called")
    )
    monkeypatch.setitem(
        open_clip.pretrained._PRETRAINED, "tiny-vit", {"first_tag": {"file": str(file)}}
    )
    for given in (f"open_clip:tiny-vit/{file}", "open_clip:tiny-vit/first_tag", str(file)):
        refuses(r"TorchScript archive.*open_clip:ViT-B-32/openai", declip.load, given)


def test_wrong_folders(tmp_path):
    folder = folder_of(random_model("tiny-vit"), tmp_path / "model", "tiny-vit")
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    for where in (folder, f"open_clip:local-dir:{folder}"):
        assert same(declip.load(where, device="cpu"), random_model("tiny-vit"))
    stored = json.loads(config.read_text())
    for trust in (True, 1, "yes"):
        changed = copy.deepcopy(stored)
        changed["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": trust}
        config.write_text(json.dumps(changed))
        refuses(r"trust_remote_code", declip.load, folder)
    for text in (
        "{",
        "[]",
        '{"model_cfg": {}}',
        '{"model_cfg": {"embed_dim": 8}}',
        '{"preprocess_cfg": {}}',
    ):
        config.write_text(text)
        refuses("Cannot load", declip.load, folder)
    config.write_text(json.dumps(stored))
    weights.rename(folder / "weights.pt")
    refuses(r"open_clip_config.json.*\*\.safetensors", declip.load, folder)


@pytest.mark.parametrize(
    "given", ["open_clip:ViT-B-32/openai", "hf-hub:owner/name", "timm:resnet18.a1_in1k"]
)
def test_without_network_nothing_is_tried_again(given, tmp_path, monkeypatch, capfd):
    """The client of the Hub tries for a minute; here no request is made, and what is offline is named."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(
        "open_clip.pretrained.hf_hub_download", lambda *_, **__: pytest.fail("a request was made")
    )
    refuses(rf"'{given}'.*{address}.*builtin:lite2-minilm", declip.load, given)
    assert capfd.readouterr() == ("", "")


def test_a_file_of_a_model_that_is_published_with_another_preparation(
    tmp_path, monkeypatch, caplog
):
    file = weights_file(random_model("tiny-vit"), tmp_path / "weights.pt")
    tags = {}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "tiny-vit", tags)
    for tag, mode, warned in (("first", "squash", True), ("second", "shortest", False)):
        tags[tag] = {"resize_mode": mode}
        caplog.clear()
        declip.load(f"open_clip:tiny-vit/{file}", device="cpu")
        assert ("published weights of tiny-vit" in caplog.text) == warned


def test_the_packages_that_are_missing(tmp_path, monkeypatch):
    (tmp_path / "weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    given = f"open_clip:ViT-B-16-SigLIP/{tmp_path / 'weights.safetensors'}"
    refuses(r"needs transformers: pip install transformers", declip.load, given)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refuses(r"requires open_clip: pip install 'declip\[open_clip\]'", declip.load, given)
