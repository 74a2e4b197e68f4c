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
HEAD_SIZES = {
    "simsiam.widths": (
        "projector.linear1.weight",
        "projector.linear3.weight",
        "predictor.linear1.weight",
    ),
    "simclr.widths": ("predictor_sim.linear1.weight", "predictor_sim.linear3.weight"),
    "late_interaction.width": ("image_mapping.weight",),
}
"""Recipe key → layers whose output widths are its value."""

TEXT, EMBEDDING = "encode_text.", "encode_text.token_embedding.weight"
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
    state = {}
    for given, tensor in unwrapped(
        content, "model", "state_dict"
    ).items():  # the second is open_clip's
        if not UNUSED.match(name := re.sub(r"^text_encoder\.", TEXT, given)):  # SLIP's
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
    try:
        # Both towers, or an image tower alone
        whole = any("token_embedding" in name for name in state)
        if not whole and not any(name.startswith("visual.") for name in state):
            state = {
                f"visual.{name}": tensor
                for name, tensor in state.items()
                if not UNUSED.match(f"visual.{name}")
            }
        tensors = {
            name: tensor for name, tensor in state.items() if whole or name.startswith("visual.")
        }
        needed = ("visual.conv1.weight", *(("logit_scale", EMBEDDING) if whole else ()))
        if (
            not set(needed) <= tensors.keys()
            or not {layouts.CLASS_TOKEN, layouts.GRID} & tensors.keys()
        ):
            raise UserError(NOT_OFFICIAL)
        # Rows of words in the order of declip
        for name in [
            name for name in tensors if name.startswith((EMBEDDING, "text_label_predictor."))
        ]:
            tensors[name] = tensors[name][token_order(len(tensors[name]))]
        # The official recipe with these heads
        kind = "filip" if "image_mapping.weight" in tensors else "clip"
        if "predictor_sim.linear1.weight" in tensors:
            kind = "slip"
        elif "projector.linear1.weight" in tensors:
            kind = f"de{kind}"
        recipe = load_recipe(f"{kind}-yfcc15m-vitb32", _keys(tensors))
        heads = {
            name: tensor
            for name, tensor in tensors.items()
            if layouts.rename(name, HEADS, back=True) != name
        }
        state = {name: tensor for name, tensor in tensors.items() if name not in heads}
        # The official forward pass of CLIP, DeCLIP and DeFILIP clamps the scale to 100, those of
        # SLIP and FILIP do not: their recipes have the maximum of the parameter.
        scale = state.get("logit_scale", torch.tensor(recipe.logit_scale.init))
        state["logit_scale"] = scale.reshape(()).clamp(max=recipe.logit_scale.max)
        weights = layouts.from_layout(
            recipe, layout_of(tensors), state, origin, "both" if whole else "image"
        )
    except UserError as error:
        raise UserError(f"'{origin}': {str(error).rstrip('.')}.") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(
            f"The shapes of the weights in '{origin}' cannot be read: {one_line(error)}."
        ) from error
    return replace(
        weights,
        heads={layouts.rename(name, HEADS, back=True): tensor for name, tensor in heads.items()},
    )


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
    widths = {
        key: [len(state[name]) for name in names if name in state]
        for key, names in HEAD_SIZES.items()
    }
    sizes = {
        key: size[0] if key.endswith("width") else size for key, size in widths.items() if size
    }
    return {**layouts.image_keys(state), **layouts.text_keys(state, TEXT, mask=True), **sizes}
