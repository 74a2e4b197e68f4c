"""Checkpoints of the official implementation (CLIP, SLIP, FILIP, DeCLIP, DeFILIP; arXiv 2110.05208 and 2203.05796)."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.errors import UserError
from declip.interchange import layouts
from declip.interchange.weights import Weights, read_tensors, unwrapped
from declip.io.text import one_line
from declip.models.dual_encoder import Towers
from declip.models.fingerprint import in_float32
from declip.models.tensor_names import add_prefix, only
from declip.recipe.load import load_recipe

SPECIAL = 3  # number of special ids at the end of the vocabulary: mask, start, end; in declip start, end, mask
# Unused tensors of the official models
UNUSED = re.compile(r"visual\.fc\.|predictor_sim\.bn3\.|projector_text\.")

HEADS: layouts.Names = (
    ("terms.simsiam.projector.norm#.", "projector.bn#."),
    ("terms.simsiam.projector.", "projector."),
    ("terms.simsiam.predictor.norm#.", "predictor.bn#."),
    ("terms.simsiam.predictor.linear2.", "predictor.layer2."),
    ("terms.simsiam.predictor.", "predictor."),
    ("terms.simclr.head.norm#.", "predictor_sim.bn#."),
    ("terms.simclr.head.", "predictor_sim."),
    ("terms.masked_language.head.", "text_label_predictor."),
    ("terms.late_interaction.patch_projection.", "image_mapping."),
    ("terms.late_interaction.word_projection.", "text_mapping."),
    ("terms.late_interaction.logit_scale", "logit_scale_dense"),
)
HEAD_WIDTHS = {
    "simsiam.widths": (
        "projector.linear1.weight",
        "projector.linear3.weight",
        "predictor.linear1.weight",
    ),
    "simclr.widths": ("predictor_sim.linear1.weight", "predictor_sim.linear3.weight"),
}
"""Recipe key → layers whose output widths are its values."""

TOKEN_WIDTH = ("late_interaction.width", "image_mapping.weight")
"""Recipe key, and the layer whose output width is its value."""

VISUAL, TEXT = "visual.", "encode_text."
EMBEDDING = f"{TEXT}token_embedding.weight"
NOT_OFFICIAL = (
    "these are not weights of the official implementation with CLIP's ViT or ResNet. Give a file of open_clip with its "
    "model, open_clip:MODEL/FILE, and a file of transformers or of a checkpoint by its folder"
)


def matches(where: str) -> bool:
    """Whether a path is a file; other formats of single files are tried before this one."""
    return Path(where).expanduser().is_file()  # a pipe would be waited for


def read(where: str) -> Weights:
    """Read a checkpoint, ``.pth.tar``, ``.pth``, ``.pt`` or ``.safetensors``."""
    return weights_of(read_tensors(Path(where).expanduser()), where)


def weights_of(content: Any, origin: str) -> Weights:
    """Convert a checkpoint or a state dict: both towers and heads, or an image tower alone, with or without prefixes.

    Sizes follow from the shapes; text tower and ViT have one attention head per 64 channels.
    """
    # The second key is open_clip's
    state = _named_as_official(unwrapped(content, "model", "state_dict"))
    try:
        return _convert(state, origin)
    except UserError as error:
        raise UserError(f"'{origin}': {str(error).rstrip('.')}.") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"The shapes of the weights in '{origin}' cannot be read: {one_line(error)}."
        ) from error


def _named_as_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The used tensors: of two towers, or with the prefix of an image tower alone."""
    # SLIP's text tower has another name
    state = {re.sub(r"^text_encoder\.", TEXT, name): tensor for name, tensor in state.items()}
    state = _used(state)
    has_text = any("token_embedding" in name for name in state)
    has_visual = any(name.startswith(VISUAL) for name in state)
    if not has_text and has_visual:
        state = only(VISUAL, state)
    elif not has_text:
        state = _used(add_prefix(VISUAL, state))
    return state


def _used(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not UNUSED.match(name)}


def _convert(state: dict[str, Tensor], origin: str) -> Weights:
    """Weights of the official recipe with the heads in a state dict."""
    state = {name: in_float32(tensor) for name, tensor in state.items()}
    has_text = any("token_embedding" in name for name in state)
    needed = {f"{VISUAL}conv1.weight"}
    if has_text:
        needed |= {"logit_scale", EMBEDDING}
    distinguishing = {layouts.CLASS_TOKEN, layouts.GRID} & state.keys()
    if not needed <= state.keys() or not distinguishing:
        raise UserError(NOT_OFFICIAL)
    # Rows of words in the order of declip
    for name in only((EMBEDDING, "text_label_predictor."), state):
        state[name] = state[name][token_order(len(state[name]))]
    recipe = load_recipe(f"{_method(state)}-yfcc15m-vitb32", _keys(state))
    heads = {}
    towers = {}
    for name, tensor in state.items():
        renamed = layouts.rename(name, HEADS, back=True)
        if renamed == name:
            towers[name] = tensor
        else:
            heads[renamed] = tensor
    # The official forward pass of CLIP, DeCLIP and DeFILIP clamps the scale to 100, those of
    # SLIP and FILIP do not: their recipes have the maximum of the parameter.
    scale = towers.get("logit_scale", torch.tensor(recipe.logit_scale.init))
    towers["logit_scale"] = scale.reshape(()).clamp(max=recipe.logit_scale.max)
    kind: Towers = "both" if has_text else "image"
    weights = layouts.from_layout(recipe, layout_of(state), towers, origin, kind)
    return replace(weights, heads=heads)


def _method(state: Mapping[str, Tensor]) -> str:
    """Name of the official method that trains the heads in a state dict."""
    if "predictor_sim.linear1.weight" in state:
        return "slip"
    method = "filip" if "image_mapping.weight" in state else "clip"
    if "projector.linear1.weight" in state:
        return f"de{method}"
    return method


def layout_of(state: Mapping[str, Any]) -> layouts.TensorLayout:
    """Layout of a state dict: CLIP's ViT or ResNet, and the official text tower."""
    return layouts.image_layout(state) + layouts.OFFICIAL_TEXT


def token_order(vocabulary: int) -> Tensor:
    """Official id of each token id of declip: (vocabulary,) int64."""
    mask, start, end = range(vocabulary - SPECIAL, vocabulary)
    return torch.cat([torch.arange(mask), torch.tensor([start, end, mask])])


def _keys(state: Mapping[str, Tensor]) -> dict[str, Any]:
    if EMBEDDING not in state:
        return layouts.image_keys(state)
    keys = {**layouts.image_keys(state), **layouts.text_keys(state, TEXT, masks=1)}
    for key, names in HEAD_WIDTHS.items():
        widths = [len(state[name]) for name in names if name in state]
        if widths:
            keys[key] = widths
    key, name = TOKEN_WIDTH
    if name in state:
        keys[key] = len(state[name])
    return keys
