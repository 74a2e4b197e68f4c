"""Models with towers of open_clip: SigLIP, MobileCLIP 2, EVA, PE-Core, the towers of CoCa."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.errors import UserError
from declip.interchange.open_clip_model import FOLDER, PREFIX, OpenClipModel
from declip.interchange.weights import Weights, check_layers, check_memory
from declip.models.dual_encoder import DualEncoder
from declip.models.layers import IMAGE, TEXT
from declip.models.wrapped import WrappedImageTower, WrappedModel, WrappedTextTower, library_state, plain
from declip.recipe.load import load_recipe

PREFIXES = ("visual.", "text.")  # prefixes of tensors of open_clip's image and text tower


def wrapped_in(model: DualEncoder) -> WrappedModel | None:
    """Configuration of a model with wrapped towers; None for other models."""
    tower = model.text_tower
    return WrappedModel.from_tensor(tower.stored) if isinstance(tower, WrappedTextTower) else None


def wrap_open_clip(opened: OpenClipModel, origin: str) -> Weights:
    """Wrap the towers of any model of open_clip, with its tokenizer and preprocessing."""
    from open_clip.model import convert_to_custom_text_state_dict

    prepared, config = opened.preprocess, {k: v for k, v in opened.config.items() if k != "multimodal_cfg"}
    sides = {prepared.size} if isinstance(prepared.size, int) else set(prepared.size)
    if prepared.resize_mode not in ("shortest", "squash") or len(sides) > 1:
        raise UserError(f"its images are resized {prepared.resize_mode} to {prepared.size}, not to a square")
    text: Any = getattr(opened.model, "text", None)
    stored = WrappedModel(
        config,
        {"interpolation": prepared.interpolation, "squash": prepared.resize_mode == "squash"},
        _open_clip_tokenizer(opened.tokenizer, config["text_cfg"]),
        plain(text.config.to_dict()) if config["text_cfg"].get("hf_model_name") else None,
    )
    name, _, _ = origin.removeprefix(PREFIX).partition("/")
    if name.startswith(FOLDER) or not origin.startswith(PREFIX):
        parts = Path(origin.removeprefix(PREFIX).removeprefix(FOLDER)).parts
        name = next((part.removeprefix("models--") for part in parts if part.startswith("models--")), parts[-1])
    state = convert_to_custom_text_state_dict(opened.model.state_dict())
    image = {"image.size": sides.pop(), "image.mean": list(prepared.mean), "image.std": list(prepared.std)}
    return _weights(stored, f"{PREFIX}{name}", {**image, "embed_dim": config["embed_dim"]}, state, origin)


def _weights(
    stored: WrappedModel, name: str, keys: Mapping[str, Any], state: Mapping[str, Tensor], origin: str
) -> Weights:
    """Load tensors into open_clip's modules, and rename them; `name` is that of both towers in the recipe."""
    size = keys["image.size"]
    # The configuration may be a stranger's: it is compared with the weights before memory is allocated for it.
    check_layers(stored.sections, len(state), "The configuration")
    with torch.device("meta"):
        check_memory(stored.build(size), sum(t.nbytes for t in state.values()), "The configuration")
    state = {n: t.detach().cpu().float() if t.is_floating_point() else t for n, t in state.items()}
    with torch.random.fork_rng(devices=[]):
        modules = stored.build(size)
    for prefix, module in zip(PREFIXES, modules, strict=True):
        module.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)})
    # Names of the tensors in declip
    tokenizer = stored.build_tokenizer()
    towers = {
        IMAGE: WrappedImageTower(modules[0], stored.kinds[0], keys["embed_dim"]),
        TEXT: WrappedTextTower(modules[1], tokenizer, stored),
    }
    tensors = {f"{start}{n}": t.detach() for start, tower in towers.items() for n, t in tower.state_dict().items()}
    tensors |= {n: state[n].squeeze() for n in ("logit_scale", "logit_bias") if n in state}
    keys = {
        **{**keys, "name": "from-open-clip", "image.model": name, "text.hf_model": name},
        **{"text.pretrained": False, "text.context_length": tokenizer.context},
        "logit_bias": float(tensors["logit_bias"]) if "logit_bias" in tensors else None,
    }
    return Weights(load_recipe("clip", keys), tensors, origin)


def _open_clip_tokenizer(tokenizer: Any, text: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `WrappedTokenizer`."""
    from open_clip.tokenizer import SigLipTokenizer, SimpleTokenizer

    options = text.get("tokenizer_kwargs") or {}
    if isinstance(tokenizer, SimpleTokenizer):
        return {"definition": None, "context": tokenizer.context_length, "clean": options.get("clean", "lower")}
    library = tokenizer.tokenizer
    if getattr(tokenizer, "tokenizer_mode", "") or library.padding_side != "right":
        raise UserError(f"its tokenizer pads on the {library.padding_side}, with the mode '{tokenizer.tokenizer_mode}'")
    return {
        "definition": library.backend_tokenizer.to_str(),
        "context": tokenizer.context_length,
        "clean": options.get("clean", "canonicalize" if isinstance(tokenizer, SigLipTokenizer) else "whitespace"),
        "padding": library.pad_token_id,
        "zeroed": library.sep_token_id if getattr(tokenizer, "strip_sep_token", False) else None,
    }


def express_wrapped(model: DualEncoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Build open_clip's configuration and tensors for a model with wrapped towers."""
    stored, recipe = wrapped_in(model), model.recipe
    assert stored is not None, "asked of a wrapped model"
    assert recipe is not None, "a model without one was refused"
    tensors = {
        f"{prefix}{name}": tensor
        for prefix, tower in zip(PREFIXES, (model.image_tower, model.text_tower), strict=True)
        for name, tensor in library_state(tower, tower.state_dict()).items()  # type: ignore[arg-type]
    }
    tensors |= {name: t for name, t in model.state_dict().items() if name.startswith("logit_")}
    config = copy.deepcopy(dict(stored.config))
    config["custom_text"] = True
    if model.logit_bias is not None:
        config.setdefault("init_logit_bias", -10)
    config["vision_cfg"]["image_size"] = recipe.image.size
    for section in ("vision_cfg", "text_cfg"):
        config[section].pop("output_tokens", None)
    return config, tensors
