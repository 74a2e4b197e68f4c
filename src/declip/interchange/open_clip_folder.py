"""A folder that open_clip loads as it is, by the name ``local-dir:FOLDER``: written from a model of ours.

CLIP's ViT and CLIP's ResNet become open_clip's own towers, whatever their sizes; every other timm model goes through
open_clip's `TimmModel`, which takes a name alone: neither options nor, where it matters, another image size.
The mask's row of CLIP's vocabulary is left out: only training reads it. A BERT or RoBERTa makes the model open_clip's
`CustomTextCLIP`, whose text tower is built from a configuration that ``hf_model_name`` leads to.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.text.tokenizer import Tokenizer
from declip.interchange.clip_layout import (
    CLIP_MERGES,
    NO_MERGES,
    RESNET_NAMES,
    VIT_NAMES,
    rename,
    resnet_sizes,
    text_activation,
    text_sizes,
    vit_sizes,
    without_mask,
)
from declip.interchange.foreign import Reread, clip_text_tower, refusal
from declip.interchange.open_clip import CONFIG
from declip.interchange.tokenizer_files import write_tokenizer
from declip.io.atomic import save_tensors
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import CONFIG as ENCODER
from declip.models.hf_encoder import PREFIX, TextEncoder
from declip.models.hf_text_tower import HuggingfaceTextTower
from declip.models.image_tower import ImageTower
from declip.models.text_tower import TextTower

log = logging.getLogger("declip")

WEIGHTS = "open_clip_model.safetensors"
INSTEAD = "onnx, safetensors"
CLOSE = 1e-4
"""A timm model built from its name alone must give these weights' features this closely."""

ENCODERS = ("bert", "roberta", "xlm-roberta")
"""Kinds of text encoders that open_clip 3.3 builds, of those that ours has."""

POOLERS = {"cls": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}

USAGE = """
import open_clip, torch
from PIL import Image

folder = "."  # this folder
model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")  # needs transformers where there is a tokenizer.json
picture = Image.new("RGB", (320, 240), "orange")  # your picture
with torch.no_grad():
    image = model.eval().encode_image(preprocess(picture)[None], normalize=True)
    texts = model.encode_text(tokenizer(["an orange square", "a cat"]), normalize=True)
print((model.logit_scale.exp() * image @ texts.T).softmax(dim=-1))
"""

Tower = tuple[dict[str, Any], dict[str, Tensor]]
"""open_clip's ``vision_cfg``, and its tensors without "visual."."""


def write_open_clip(model: DualEncoder, folder: Path, repo: str | None = None, home: Path | None = None) -> None:
    """Write open_clip_config.json, weights and, for a vocabulary other than CLIP's, a Hugging Face tokenizer.

    Args:
        model: The model.
        folder: Where to write.
        repo: The repository, OWNER/NAME, that the folder will be on the Hub: there open_clip finds tokenizer and text
            encoder by their names alone.
        home: Where the folder will be; `folder` by default.

    Raises:
        UserError: open_clip cannot express the model; the reason is given.
    """
    if isinstance(model.text_tower, HuggingfaceTextTower):
        name = _encoder_name(model) or repo or str((home or folder).absolute())
        text_config, texts = _encoder(model, model.text_tower, name, folder)
        sizes = vit_sizes(model.image_tower)
        activation = "gelu" if isinstance(sizes, str) else sizes.activation
    else:
        text = clip_text_tower(model, "open_clip")
        activation = text_activation(text)
        text_config, texts = _text_config(model, text), text_tensors(text)
    vision, images = image_tower(model, activation)
    if text_config.get("hf_model_name") or text_config["vocab_size"] != NO_MERGES + CLIP_MERGES:
        # Of a folder open_clip takes the tokenizer that lies in it, whatever the name; of a repository the name's.
        text_config |= {"hf_tokenizer_name": repo or "tokenizer.json"}
        write_tokenizer(model.tokenizer, folder)
        if repo is None:
            log.warning("This folder loads as local-dir:FOLDER alone. For the Hub export it with --repo OWNER/NAME.")
    preprocessor = model.preprocessor
    config = {
        "model_cfg": {
            "embed_dim": model.image_tower.proj.out_features,
            "quick_gelu": activation == "quick_gelu",
            "vision_cfg": {"image_size": preprocessor.size, **vision},
            "text_cfg": text_config,
        },
        "preprocess_cfg": {
            "size": preprocessor.size,
            "mode": "RGB",
            "mean": [round(value, 8) for value in preprocessor.mean.tolist()],
            "std": [round(value, 8) for value in preprocessor.std.tolist()],
            "interpolation": "bicubic",
            "resize_mode": "shortest",
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {f"visual.{name}": tensor for name, tensor in images.items()} | texts
    tensors["logit_scale"] = model.logit_scale
    save_tensors(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / WEIGHTS, {"format": "pt"}
    )


def reread_open_clip(folder: Path) -> Reread:
    """Load the folder with open_clip.

    Raises:
        ImportError: open_clip is not installed.
    """
    import open_clip

    text_config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model_cfg"]["text_cfg"]
    others = "hf_model_name" in text_config
    if others:  # the name leads here once the folder is at its place; no network until then
        more = {"text_cfg": {**text_config, "hf_model_name": str(folder), "hf_model_pretrained": False}}
    model: Any = open_clip.create_model(f"local-dir:{folder}", weights_only=True, **(more if others else {})).eval()
    context = int(model.context_length)
    return Reread(
        f"open_clip {open_clip.__version__}",
        model.encode_image,
        lambda tokens: model.encode_text(tokens if others else F.pad(tokens, (0, context - tokens.shape[1]))),
    )


def _text_config(model: DualEncoder, text: TextTower) -> dict[str, Any]:
    assert isinstance(model.tokenizer, Tokenizer)
    sizes = text_sizes(text)
    config = {
        "context_length": sizes["context"],
        "vocab_size": len(without_mask(text)),
        "width": sizes["width"],
        "heads": sizes["heads"],
        "layers": sizes["layers"],
        "proj_bias": text.text_projection.bias is not None,
    }
    return config if model.tokenizer.merges == CLIP_MERGES else config | {"tokenizer_kwargs": {"clean": "lower"}}


def _encoder_name(model: DualEncoder) -> str | None:
    """The text encoder's name on the Hub, where it came from there."""
    given = (model.recipe.text.hf_model if model.recipe else None) or ""
    return given.removeprefix(PREFIX) if given.startswith(PREFIX) else None


def _encoder(
    model: DualEncoder, tower: HuggingfaceTextTower, name: str, folder: Path
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """open_clip's ``text_cfg`` and tensors; the encoder's configuration is written into the folder.

    Args:
        name: What leads to that configuration: an encoder's on the Hub, a repository's, or a folder's.
    """
    encoder = TextEncoder.from_tensor(tower.get_extra_state())
    kind, reason = encoder.config["model_type"], None
    if kind not in ENCODERS:
        reason = f"its text encoder is a {kind}, and open_clip has {', '.join(ENCODERS)}"
    elif tower.pooling not in POOLERS:
        reason = f"its text tower pools at the {tower.pooling}"
    elif tower.text_projection.bias is not None:
        reason = "it has a bias after its text projection"
    if reason:
        raise refusal("open_clip", reason, INSTEAD)
    (folder / ENCODER).write_text(json.dumps(dict(encoder.config), indent=2) + "\n", encoding="utf-8")
    config = {
        "context_length": tower.context,
        "vocab_size": encoder.config["vocab_size"],
        "hf_model_name": name,
        "hf_proj_type": "linear",
        "hf_pooler_type": POOLERS[tower.pooling],
    }
    tensors = {f"text.transformer.{part}": tensor for part, tensor in tower.encoder.state_dict().items()}
    return config, tensors | {"text.proj.weight": tower.text_projection.weight}


def text_tensors(text: TextTower) -> dict[str, Tensor]:
    state = text.state_dict()
    state["token_embedding.weight"] = without_mask(text)
    if text.text_projection.bias is None:
        state["text_projection"] = state.pop("text_projection.weight").T
    return state


def image_tower(model: DualEncoder, text_act: str) -> Tower:
    tower = model.image_tower
    state = tower.state_dict()
    vit, resnet = vit_sizes(tower), resnet_sizes(tower)
    if not isinstance(vit, str) and vit.activation == text_act and vit.width % vit.heads == 0:
        config = {
            "layers": vit.layers,
            "width": vit.width,
            "head_width": vit.width // vit.heads,
            "patch_size": vit.patch,
            "mlp_ratio": vit.hidden / vit.width,
            "norm_kwargs": {"eps": vit.eps},
        }
        tensors = {rename(name, VIT_NAMES): tensor for name, tensor in state.items()}
        shapes: dict[str, Callable[[Tensor], Tensor]] = {
            "class_embedding": torch.flatten, "positional_embedding": torch.squeeze, "proj": torch.t,
        }  # fmt: skip
        return config, {name: shapes.get(name, torch.Tensor.detach)(tensor) for name, tensor in tensors.items()}
    if not isinstance(resnet, str):
        config = {
            "layers": list(resnet.layers),
            "width": resnet.width,
            "head_width": resnet.width * 32 // resnet.heads,
            "patch_size": None,
        }
        return config, {rename(name, RESNET_NAMES): tensor for name, tensor in state.items()}
    if isinstance(vit, str):
        return _timm_tower(model, f"its image tower is not CLIP's ViT ({vit}) nor CLIP's ResNet", INSTEAD)
    why = f"its image tower computes with {vit.activation}, its text tower with {text_act}"
    return _timm_tower(model, why, f"huggingface, {INSTEAD}")


def _timm_tower(model: DualEncoder, why: str, instead: str) -> Tower:
    """As open_clip builds it: the trunk without classifier by its name alone, then a linear map."""
    tower, size = model.image_tower, model.preprocessor.size
    name = model.recipe.image.model if model.recipe else ""
    try:
        trunk, state = _by_name(tower, name)
        pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        expected, found = tower(pixels.to(model.device)).pre_logits.cpu(), trunk(pixels)
        if found.shape != expected.shape or trunk.num_features != found.shape[1]:
            raise ValueError(f"features of {trunk.num_features} instead of {expected.shape[1]} numbers")
        if not torch.allclose(found, expected, atol=CLOSE, rtol=CLOSE):
            raise ValueError(f"features that differ by {(found - expected).abs().max():.2g}")
    except Exception as error:  # of whatever kind: timm's models fail in their own ways where options are missing
        said = " ".join(str(error).split())[:160]
        raise refusal(
            "open_clip",
            f"{why}, and of other towers open_clip takes a timm name alone, without image.model_kwargs and at the timm "
            f"model's own image size; that gives another network than this one ('{name}', {size} px): {said}",
            instead,
        ) from error
    tensors = {f"trunk.{part}": tensor for part, tensor in state.items()}
    tensors |= {f"head.proj.{part}": tensor for part, tensor in tower.proj.state_dict().items()}
    config = {"timm_model_name": name, "timm_pool": "", "timm_proj": "linear"}
    return config | {"timm_proj_bias": tower.proj.bias is not None}, tensors


def _by_name(tower: ImageTower, name: str) -> tuple[Any, dict[str, Tensor]]:
    """The trunk that timm builds from a name, with a tower's weights, and these by its names."""
    if not timm.is_model(name):
        raise ValueError("it is none of timm's names")
    with torch.random.fork_rng(devices=[]):
        trunk: Any = timm.create_model(name, pretrained=False)
    trunk.reset_classifier(0)
    norm = {f"norm.{part}": tensor for part, tensor in tower.norm.state_dict().items()}
    state = {**tower.trunk.state_dict(), **norm}
    trunk.load_state_dict(state)
    return trunk.eval(), state
