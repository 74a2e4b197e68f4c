"""A folder that transformers' `CLIPModel` and `CLIPProcessor` load as it is: written from a model of ours.

`CLIPModel` has CLIP's vision transformer only, and no bias after its text projection: the authors' bias moves into the
last norm of the text tower, where the projection can be solved for it. The mask's row of the vocabulary is left out:
only training reads it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from declip.interchange.clip_layout import (
    VIT_NAMES,
    VitSizes,
    clip_name,
    text_activation,
    text_sizes,
    vit_sizes,
    without_mask,
)
from declip.interchange.foreign import Reread, clip_text_tower, refusal
from declip.interchange.tokenizer_files import write_tokenizer
from declip.models.dual_encoder import DualEncoder
from declip.models.text_tower import TextTower

INSTEAD = "open_clip, onnx, safetensors"
LARGEST_BIAS = 50
"""Times what it is added to: beside a bias that large float32 keeps features to 1e-5, hardly beside a larger one."""

NAMES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^class_embedding$", "embeddings.class_embedding"),
        (r"^conv1\.", "embeddings.patch_embedding."),
        (r"^token_embedding\.", "embeddings.token_embedding."),
        (r"^positional_embedding$", "embeddings.position_embedding.weight"),
        (r"^ln_pre\.", "pre_layrnorm."),
        (r"^ln_post\.", "post_layernorm."),
        (r"^ln_final\.", "final_layer_norm."),
        (r"^transformer\.resblocks\.(\d+)\.ln_([12])\.", r"encoder.layers.\1.layer_norm\2."),
        (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.layers.\1.self_attn.out_proj."),
        (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.layers.\1.mlp.fc1."),
        (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.layers.\1.mlp.fc2."),
    )
)
"""CLIP's names, without its towers' prefixes → transformers', without theirs; "pre_layrnorm" is spelled so there."""

TOGETHER = re.compile(r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)$")
"""Query, key and value lie in one tensor in CLIP, in three in transformers."""

USAGE = """
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

folder = "."  # this folder
model = CLIPModel.from_pretrained(folder).eval()
processor = CLIPProcessor.from_pretrained(folder, backend="pil")  # pixels as in training; leave it out before version 5
picture = Image.new("RGB", (320, 240), "orange")  # your picture
texts = ["an orange square", "a cat"]
inputs = processor(text=texts, images=picture, padding=True, truncation=True, return_tensors="pt")
with torch.no_grad():
    print(model(**inputs).logits_per_image.softmax(dim=-1))
"""


def write_huggingface(model: DualEncoder, folder: Path) -> None:
    """Write config.json, model.safetensors, preprocessor_config.json and the tokenizer's files.

    Raises:
        UserError: `CLIPModel` cannot express the model; the reason is given.
    """
    text = clip_text_tower(model, "huggingface")
    sizes = vit_sizes(model.image_tower)
    if isinstance(sizes, str):
        raise refusal(
            "huggingface", f"CLIPModel has CLIP's vision transformer only, and of this image tower {sizes}", INSTEAD
        )
    _write_json(folder / "config.json", _config(model, sizes, text))
    _write_json(folder / "preprocessor_config.json", _preprocessor(model))
    write_tokenizer(model.tokenizer, folder)
    tensors = _renamed("vision_model", _vision_tensors(model)) | _renamed("text_model", _text_tensors(text))
    tensors["visual_projection.weight"] = model.image_tower.proj.weight
    tensors["text_projection.weight"] = text.text_projection.weight
    tensors["logit_scale"] = model.logit_scale
    kept = {name: tensor.detach().cpu().float().contiguous() for name, tensor in tensors.items()}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def reread_huggingface(folder: Path) -> Reread:
    """Load the folder with transformers.

    Raises:
        ImportError: transformers is not installed.
    """
    import transformers
    from transformers.utils import logging

    shows = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    finally:
        if shows:
            logging.enable_progress_bar()
    return Reread(
        f"transformers {transformers.__version__}",
        lambda pixels: model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output),
        lambda tokens: model.text_projection(model.text_model(input_ids=tokens).pooler_output),
    )


def fold_bias(weight: Tensor, bias: Tensor, size: float) -> Tensor:
    """Find what, added before a linear map, does what its bias does after it.

    Args:
        weight: (d, width) of the map.
        bias: (d,).
        size: Length of what the map takes.

    Returns:
        (width,) float64 x with weight · x = bias, the shortest there is.

    Raises:
        UserError: there is none, or float32 would lose digits by it.
    """
    weight, bias = weight.detach().double().cpu(), bias.detach().double().cpu()
    rows, columns = weight.shape
    moved = torch.linalg.pinv(weight) @ bias
    ratio = float(moved.norm() / size)
    reason = None
    if rows > columns:
        reason = f"the projection goes from {columns:,} to {rows:,} numbers, so it cannot be inverted"
    elif not torch.allclose(weight @ moved, bias, rtol=1e-7, atol=1e-9 * float(bias.abs().max())):
        reason = "the projection is singular, so it cannot be inverted"
    elif ratio > LARGEST_BIAS:
        reason = f"the projection is nearly singular: it would be {ratio:,.0f} times as long as what it is added to"
    if reason:
        what = "CLIPModel has no bias after the text projection, and this one cannot move before it"
        raise refusal("huggingface", f"{what}: {reason}", INSTEAD)
    return moved


def _config(model: DualEncoder, vision: VitSizes, text: TextTower) -> dict[str, Any]:
    tokenizer, sizes = model.tokenizer, text_sizes(text)
    embed_dim = model.image_tower.proj.out_features
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": embed_dim,
        "logit_scale_init_value": model.logit_scale.item(),
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": len(without_mask(text)),
            "hidden_size": sizes["width"],
            "intermediate_size": 4 * sizes["width"],
            "projection_dim": embed_dim,
            "num_hidden_layers": sizes["layers"],
            "num_attention_heads": sizes["heads"],
            "max_position_embeddings": sizes["context"],
            "hidden_act": text_activation(text),
            "layer_norm_eps": text.ln_final.eps,
            "bos_token_id": tokenizer.start,
            "eos_token_id": tokenizer.end,
            "pad_token_id": tokenizer.end,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": vision.width,
            "intermediate_size": vision.hidden,
            "projection_dim": embed_dim,
            "num_hidden_layers": vision.layers,
            "num_attention_heads": vision.heads,
            "image_size": model.preprocessor.size,
            "patch_size": vision.patch,
            "hidden_act": vision.activation,
            "layer_norm_eps": vision.eps,
        },
    }


def _preprocessor(model: DualEncoder) -> dict[str, Any]:
    preprocessor = model.preprocessor
    side = preprocessor.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(value, 8) for value in preprocessor.mean.tolist()],
        "image_std": [round(value, 8) for value in preprocessor.std.tolist()],
    }


def _vision_tensors(model: DualEncoder) -> dict[str, Tensor]:
    """By CLIP's names, without the projection."""
    state = {clip_name(name, VIT_NAMES): tensor for name, tensor in model.image_tower.state_dict().items()}
    del state["proj"]
    state["class_embedding"] = state["class_embedding"].flatten()
    state["positional_embedding"] = state["positional_embedding"][0]
    return state


def _text_tensors(text: TextTower) -> dict[str, Tensor]:
    """By CLIP's names, without the projection, whose bias is in the last norm."""
    state = {name: tensor for name, tensor in text.state_dict().items() if not name.startswith("text_projection.")}
    state["token_embedding.weight"] = without_mask(text)
    projection = text.text_projection
    if projection.bias is not None:
        moved = fold_bias(projection.weight, projection.bias, float(state["ln_final.weight"].norm()))
        state["ln_final.bias"] = (state["ln_final.bias"].double().cpu() + moved).float()
    return state


def _renamed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        if together := TOGETHER.match(name):
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                found[f"{prefix}.encoder.layers.{together[1]}.self_attn.{part}_proj.{together[2]}"] = third
            continue
        for pattern, replacement in NAMES:
            name = pattern.sub(replacement, name)
        found[f"{prefix}.{name}"] = tensor
    return found


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
