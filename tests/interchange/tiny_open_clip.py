"""What the tests of open_clip's models share: tiny ones of each kind with their weights in files, pictures, words."""

import json

import open_clip
import torch
from safetensors.torch import save_file

from interchange import towers

TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
CONFIGS = {
    "tiny-vit": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": TEXT,
    },
    "tiny-resnet": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
        "text_cfg": TEXT,
    },
    "tiny-convnext": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
}  # fmt: skip
WORDS = ["a red circle", "Two GREEN squares, on white!", "", "nought " * 40]


def random_model(name, seed=5):
    """open_clip's own model in evaluation mode, no weight left at its start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


def saved(model, path):
    """Its weights in a file, by open_clip's ways: a bare state dict, or a checkpoint of its training."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.name == "epoch_1.pt":
        checkpoint = {"epoch": 1, "name": "run", "state_dict": {f"module.{name}": w for name, w in state.items()}}
        torch.save(checkpoint, path)
    else:
        torch.save(state, path)
    return path


def folder_of(model, folder, name):
    """A folder of the schema local-dir."""
    folder.mkdir()
    config = {"model_cfg": CONFIGS[name], "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    saved(model, folder / "open_clip_model.safetensors")
    return folder


def pictures():
    """Four wide and high ones."""
    return towers.pictures()[1:5]


def same(model, theirs):
    """Whether a model of declip has the features of open_clip's, for its pixels and open_clip's tokens."""
    pixels, tokens = model.preprocess(pictures()), open_clip.tokenize(WORDS, context_length=12)
    with torch.no_grad():
        images = model.encode_image(pixels) - theirs.encode_image(pixels, normalize=True)
        texts = model.encode_text(model.tokenize(WORDS)) - theirs.encode_text(tokens, normalize=True)
    return bool(max(images.abs().max(), texts.abs().max()) <= 1e-6)
