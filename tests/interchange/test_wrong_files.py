"""Every wrong file of weights, by each reader of files: one line names the file and what differs first."""

import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

import declip
from conftest import refuses
from declip.interchange import official
from declip.interchange.declip_file import FILE
from declip.models.hf_encoder import ENTRY, TextEncoder
from golden_cases import read_state
from hostile import apart
from interchange.families import folder_of, random_model, saved
from interchange.towers import build


def zeros(*names, start=""):
    return {f"{start}{name}": torch.zeros(1) for name in names}


def without(state, name):
    return {other: tensor for other, tensor in state.items() if other != name}


def image_tower(state):
    return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}


def in_file(content, name):
    if name.endswith("safetensors"):
        return save(content)
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def half(content, name):
    whole = in_file(content, name)
    return whole[: len(whole) // 2]


NORM, CLIP = "visual.ln_post.weight", ("visual.conv1.weight", "visual.proj", "logit_scale")
NOT_OFFICIAL = "not weights of the official implementation"
UNREADABLE = "Cannot read weights from '{name}'"
THEIRS = "open_clip:MODEL/FILE"
ONNX = b"\x08\x08\x12\x07pytorch"
TORCHVISION = {
    "conv1.weight": torch.ones(8, 3, 7, 7),
    "layer1.0.conv1.weight": torch.ones(8, 8, 1, 1),
}

WRONG = {
    "missing.pth": (lambda own: without(own, NORM), r"'visual\.ln_post\.weight' is missing"),
    "holed.pth": (
        lambda own: without(image_tower(own), NORM),
        r"'visual\.ln_post\.weight' is missing",
    ),
    "shape.pth": (
        lambda own: own | {NORM: torch.ones(3)},
        r"'visual\.ln_post\.weight' has shape \(3,\)",
    ),
    "more.pth": (
        lambda own: own | {"visual.extra": torch.ones(1)},
        "'visual.extra' belongs to another",
    ),
    "torchvision.pth": (lambda _: TORCHVISION, NOT_OFFICIAL),
    "clip.pt": (lambda _: zeros(*CLIP), NOT_OFFICIAL),
    "no_scale.pt": (
        lambda _: zeros("encode_text.token_embedding.weight", "visual.proj"),
        NOT_OFFICIAL,
    ),
    "run.pt": (
        lambda _: {"state_dict": zeros(*CLIP, "text.token_embedding.weight", start="module.")},
        THEIRS,
    ),
    "misshapen.pt": (
        lambda _: random_model("tiny-vit").state_dict() | {"visual.proj": torch.zeros(7, 7)},
        THEIRS,
    ),
    "half.pth": (lambda own: half(own, "half.pth"), f"{UNREADABLE}.*Download the file again"),
    "half.safetensors": (lambda own: half(own, "half.safetensors"), UNREADABLE),
    "model.onnx": (lambda _: ONNX, "'{name}' is not a file"),
    "nowhere.pth": (lambda _: None, "'{name}' is not a file"),
}
"""What a file holds, made from the tensors of an official model, and how the official reader refuses it."""


@pytest.mark.usefixtures("open_clip_configs")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_by_each_reader(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make, message = WRONG[name]
    content = make({part: t.float() for part, t in read_state("clip_vit_tiny").items()})
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else in_file(content, name))
    refuses(message.format(name=name), official.read, name)
    theirs = (
        f"Cannot load 'open_clip:tiny-vit/{name}'.*Give weights of" if content is not None else name
    )
    said = refuses(theirs, declip.load, f"open_clip:tiny-vit/{name}")
    assert len(said) < 800
    if name == "misshapen.pt":
        assert "size mismatch" in said
        assert "visual.proj" in said


def test_a_file_of_ours_that_was_changed_names_the_first_tensor(tmp_path):
    from safetensors import safe_open

    declip.export(build("vit"), "safetensors", tmp_path / "out")
    with safe_open(tmp_path / "out" / FILE, "pt") as file:
        about = file.metadata()
    tensors, recipe = load_file(tmp_path / "out" / FILE), about["declip.recipe"]
    first = "model.image_tower.norm.weight"
    for weights, embed_dim, message in (
        (
            without(tensors, first),
            "16",
            r"do not fit their recipe: 'image_tower\.norm\.weight' is missing",
        ),
        (tensors | {"model.extra": torch.ones(1)}, "16", "'extra' belongs to another model"),
        (
            tensors | {first: torch.ones(3)},
            "16",
            r"'image_tower\.norm\.weight' has shape \(3,\) instead of \(64,\)",
        ),
        (tensors, "many", r"The recipe in .*embed_dim"),
        (
            tensors,
            "32",
            r"proj\.weight' has shape \(16, 64\) instead of \(32, 64\), and 1 more differ",
        ),
    ):
        metadata = about | {
            "declip.recipe": recipe.replace("embed_dim: 16", f"embed_dim: {embed_dim}")
        }
        (tmp_path / "changed.safetensors").write_bytes(save(weights, metadata))
        refuses(message, declip.load, tmp_path / "changed.safetensors")


LAYERS = 1_000


def small_file(folder, tensors, **keys):
    """A file of some hundred bytes."""
    recipe = declip.load_recipe("few-clip", keys).to_yaml()
    path = folder / "small.safetensors"
    path.write_bytes(save(tensors, {"declip.recipe": recipe}))
    return path


def own_file(folder):
    return small_file(
        folder, {"model.text_tower.ln_final.weight": torch.ones(1)}, **{"text.layers": LAYERS}
    )


def own_file_with_encoder(folder):
    encoder = TextEncoder({"model_type": "bert", "num_hidden_layers": LAYERS}, "{}", {})
    return small_file(folder, {f"model.{ENTRY}": encoder.to_tensor()}, **{"text.hf_model": "x"})


def encoder_of_open_clip(folder):
    saved("biomedclip", folder / "biomedclip")
    config = folder / "biomedclip" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": LAYERS}))
    return config.parent


@pytest.mark.parametrize("make", [own_file, own_file_with_encoder, encoder_of_open_clip])
def test_more_layers_than_tensors_are_refused_before_they_are_built(make, tmp_path):
    where = make(tmp_path)
    got, megabytes = apart(lambda: declip.load(where, device="cpu"))
    assert re.search(r"1,00\d layers", got), got
    assert megabytes < 300


def wide_tower(folder):
    theirs = folder_of(random_model("tiny-vit"), folder / "wide", "tiny-vit")
    return widened(theirs / "open_clip_config.json", "model_cfg", "vision_cfg", width=2048)


def wide_encoder(folder):
    saved("biomedclip", folder / "wide")
    return widened(folder / "wide" / "config.json", intermediate_size=10**6)


def widened(file, *sections, **sizes):
    content = part = json.loads(file.read_text())
    for section in sections:
        part = part[section]
    part.update(sizes)
    file.write_text(json.dumps(content))
    return file.parent


@pytest.mark.usefixtures("open_clip_configs")
@pytest.mark.parametrize("make", [wide_tower, wide_encoder])
def test_what_takes_far_more_memory_than_its_file_is_refused(make, tmp_path):
    refuses(
        r"takes [\d,]+ bytes of memory, but its weights have [\d,]+",
        declip.load,
        make(tmp_path),
        device="cpu",
    )
