"""What the tests of open_clip's models share: tiny ones of each kind with their weights in files, pictures, words."""

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

from declip.interchange import open_clip_model as ours
from interchange import towers

TEXT = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
CONFIGS: dict[str, dict[str, Any]] = {
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
    "tiny-coca": {
        "embed_dim": 16,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8,
            "attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4, "output_tokens": True,
        },
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
    },
    "tiny-mapped": {  # as SigLIP: pooled by attention without a projection, a bias, text not causal, pooled at its end
        "embed_dim": 64,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": "none"},
        "text_cfg": {
            **TEXT, "context_length": 20, "no_causal_mask": True, "proj_bias": True, "pool_type": "last",
            "tokenizer_kwargs": {"clean": "canonicalize"},
        },
    },
    "tiny-convnext": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": TEXT,
    },
    "tiny-classifier": {  # as MobileCLIP: the trunk's classifier is the projection
        "embed_dim": 16,
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "token", "timm_proj": None},
        "text_cfg": TEXT,
    },
}  # fmt: skip
WORDS = ["a red circle", "Two GREEN squares, on white!", "", "nought " * 40]


def random_model(name: str, seed: int = 5) -> Any:
    """open_clip's own model in evaluation mode, no weight left at its start."""
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = open_clip.create_model(name)
        with torch.no_grad():
            for weight in model.parameters():
                weight.nan_to_num_()  # CoCa's decoder leaves a weight as the memory was
                weight.add_(0.05 * torch.randn_like(weight))
    return model.eval()


def saved(model: torch.nn.Module, path: Path) -> Path:
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


def folder_of(model: torch.nn.Module, folder: Path, name: str, preprocess: dict[str, Any]) -> Path:
    """A folder of the schema local-dir."""
    folder.mkdir()
    config = {"model_cfg": CONFIGS[name], "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    saved(model, folder / "open_clip_model.safetensors")
    return folder


def pictures() -> list[Image.Image]:
    """Four wide and high ones."""
    return towers.pictures()[1:5]


def same_weights(ours_: ours.OpenClip, theirs: torch.nn.Module) -> bool:
    state = theirs.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in ours_.model.state_dict().items())
