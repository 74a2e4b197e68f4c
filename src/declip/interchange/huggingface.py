"""A folder that transformers' `CLIPModel` and `CLIPProcessor` load as it is: written from a model of ours.

`CLIPModel` has CLIP's vision transformer only, and no bias after its text projection: the authors' bias moves into the
last norm of the text tower, where the projection can be solved for it. The mask's row of the vocabulary is left out:
only training reads it.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.interchange.clip_layout import (
    VIT_NAMES,
    Names,
    VitSizes,
    rename,
    text_activation,
    text_sizes,
    vit_sizes,
    without_mask,
)
from declip.interchange.foreign import Reread, clip_text_tower, refusal
from declip.interchange.tokenizer_files import write_tokenizer
from declip.io.atomic import save_tensors
from declip.models.dual_encoder import DualEncoder
from declip.models.text_tower import TextTower

INSTEAD = "open_clip, onnx, safetensors"
LARGEST_BIAS = 50
"""Times what it is added to: beside a bias that large float32 keeps features to 1e-5, hardly beside a larger one."""

NAMES: Names = (
    ("class_embedding", "embeddings.class_embedding"),
    ("conv1.", "embeddings.patch_embedding."),
    ("token_embedding.", "embeddings.token_embedding."),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_pre.", "pre_layrnorm."),
    ("ln_post.", "post_layernorm."),
    ("ln_final.", "final_layer_norm."),
    ("transformer.resblocks.#.ln_1.", "encoder.layers.#.layer_norm1."),
    ("transformer.resblocks.#.ln_2.", "encoder.layers.#.layer_norm2."),
    ("transformer.resblocks.#.attn.in_proj_", "encoder.layers.#.self_attn.?_proj."),
    ("transformer.resblocks.#.attn.out_proj.", "encoder.layers.#.self_attn.out_proj."),
    ("transformer.resblocks.#.mlp.c_fc.", "encoder.layers.#.mlp.fc1."),
    ("transformer.resblocks.#.mlp.c_proj.", "encoder.layers.#.mlp.fc2."),
)
"""CLIP's, without its towers' prefixes, and transformers', without theirs. "pre_layrnorm" is spelled so there; ? stands
for q, k and v, which lie in one tensor in CLIP."""

WHOLE = {
    "image_tower.proj.weight": "visual_projection.weight",
    "text_tower.text_projection.weight": "text_projection.weight",
    "logit_scale": "logit_scale",
}
"""What lies in neither tower there."""

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
    kept = {name: tensor.detach().cpu().float().contiguous() for name, tensor in their_tensors(model).items()}
    save_tensors(kept, folder / "model.safetensors", {"format": "pt"})


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


def their_names(name: str) -> tuple[str, ...]:
    """transformers' name for a tensor of ours; three where it has three tensors for it."""
    if name in WHOLE:
        return (WHOLE[name],)
    tower, _, rest = name.partition(".")
    if tower == "image_tower":
        renamed = f"vision_model.{rename(rename(rest, VIT_NAMES), NAMES)}"
    else:
        renamed = f"text_model.{rename(rest, NAMES)}"
    return tuple(renamed.replace("?", part) for part in "qkv") if "?" in renamed else (renamed,)


def their_tensors(model: DualEncoder) -> dict[str, Tensor]:
    """A model's tensors by transformers' names, in its shapes.

    Args:
        model: With CLIP's vision transformer and CLIP's text tower; it may be on the device "meta".

    Raises:
        UserError: the bias after the text projection cannot move before it.
    """
    assert isinstance(model.text_tower, TextTower)
    state = dict(model.state_dict())
    state["image_tower.trunk.cls_token"] = state["image_tower.trunk.cls_token"].flatten()
    state["image_tower.trunk.pos_embed"] = state["image_tower.trunk.pos_embed"][0]
    state["text_tower.token_embedding.weight"] = without_mask(model.text_tower)
    bias = state.pop("text_tower.text_projection.bias", None)
    if bias is not None:
        weight, norm = state["text_tower.text_projection.weight"], float(state["text_tower.ln_final.weight"].norm())
        moved = fold_bias(weight, bias, norm)
        state["text_tower.ln_final.bias"] = (state["text_tower.ln_final.bias"].double().cpu() + moved).float()
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = their_names(name)
        found |= zip(names, tensor.chunk(len(names)) if len(names) > 1 else [tensor], strict=True)
    return found


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
