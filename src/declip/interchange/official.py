"""Checkpoints of the official implementation (CLIP, SLIP, FILIP, DeCLIP, DeFILIP; arXiv 2110.05208 and 2203.05796).

A checkpoint is ``{"last_iter", "model", "optimizer"}`` with "module." before every name. What differs: its vocabulary
has ``<|mask|>`` before start and end, ours has it last; its image projection lies transposed; its queue is not saved.
The sizes are read off the shapes, except for the number of attention heads. A file may hold the image tower alone, with
or without its projection.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.errors import UserError
from declip.interchange import huggingface, layouts, open_clip_model
from declip.interchange.files import read_tensors, unwrapped
from declip.interchange.weights import NO_TEXT, Weights, one_line
from declip.recipe.load import load_recipe

SPECIAL = 3
"""Ids at the end of the official vocabulary: mask, start, end. Ours: start, end, mask."""

UNUSED = re.compile(r"visual\.fc\.|predictor_sim\.bn3\.|projector_text\.")
"""Tensors that the official models hold and never use."""

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
    "simsiam.hidden": "projector.linear1.weight",
    "simsiam.out": "projector.linear3.weight",
    "simsiam.predictor_hidden": "predictor.linear1.weight",
    "simclr.hidden": "predictor_sim.linear1.weight",
    "simclr.out": "predictor_sim.linear3.weight",
    "late_interaction.width": "image_mapping.weight",
}
"""Recipe key → the layer whose output width it is."""

TEXT, EMBEDDING = "encode_text.", "encode_text.token_embedding.weight"
NOT_OFFICIAL = (
    "these are not weights of the official implementation with CLIP's ViT or ResNet: {} not found. Give a checkpoint "
    "of that code, or its state dict"
)


def matches(where: str) -> bool:
    """Whether a path is a file; the other formats that are single files are recognized before this one."""
    return Path(where).expanduser().is_file()  # a pipe would be waited for


def read(where: str, text_heads: int | None = None, image_heads: int | None = None) -> Weights:
    """Read a checkpoint, ``.pth.tar``, ``.pth``, ``.pt`` or ``.safetensors``: both towers and heads, or an image tower.

    Args:
        text_heads: Attention heads of the text tower; by default one for each 64 channels.
        image_heads: The same for a vision transformer; by default `text_heads` where both towers are equally wide.
    """
    return weights_of(read_tensors(Path(where).expanduser()), where, text_heads, image_heads)


def weights_of(content: Any, origin: str, text_heads: int | None = None, image_heads: int | None = None) -> Weights:
    """Convert a checkpoint's content or its state dict; names may lack "module.", of an image tower alone "visual."."""
    state = _tensors_of(content)
    try:
        whole = any("token_embedding" in name for name in state)
        tensors = state if whole else _image_tower(state)
        needed = ("visual.conv1.weight", *(("logit_scale", EMBEDDING) if whole else ()))
        missing = [name for name in needed if name not in tensors]
        if missing or not {layouts.CLASS_TOKEN, layouts.GRID} & tensors.keys():
            raise UserError(NOT_OFFICIAL.format(", ".join(missing) or f"{layouts.CLASS_TOKEN} and {layouts.GRID}"))
        tensors = _in_our_order(tensors)
        recipe = load_recipe(_recipe_name(tensors), _keys(tensors, text_heads, image_heads))
        heads = {name: tensor for name, tensor in tensors.items() if layouts.rename(name, HEADS, back=True) != name}
        towers = {name: tensor for name, tensor in tensors.items() if name not in heads}
        # The official forward pass cuts a larger scale off.
        scale = towers.get("logit_scale", torch.tensor(recipe.logit_scale.init))
        towers["logit_scale"] = scale.reshape(()).clamp(max=recipe.logit_scale.max)
        weights = layouts.from_layout(recipe, layout_of(tensors), towers, origin, whole)
    except UserError as error:
        raise _known_otherwise(origin, state) or UserError(f"'{origin}': {str(error).rstrip('.')}.") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"The shapes of the weights in '{origin}' cannot be read: {one_line(error)}.") from error
    return replace(weights, heads={layouts.rename(name, HEADS, back=True): tensor for name, tensor in heads.items()})


def layout_of(state: Mapping[str, Any]) -> layouts.TensorLayout:
    """Give the form of the towers of a state dict: CLIP's ViT or ResNet, and the official text tower."""
    return (layouts.CLIP_VIT if layouts.CLASS_TOKEN in state else layouts.CLIP_RESNET) + layouts.OFFICIAL_TEXT


def token_order(vocabulary: int) -> Tensor:
    """For each of our token ids, the official id of the same token: (vocabulary,) int64."""
    mask, start, end = range(vocabulary - SPECIAL, vocabulary)
    return torch.cat([torch.arange(mask), torch.tensor([start, end, mask])])


def _tensors_of(content: Any) -> dict[str, Tensor]:
    """The named tensors of a checkpoint or a state dict, names without "module.", without unused ones."""
    state = {}
    for given, tensor in unwrapped(content, "model", "state_dict").items():  # the second is open_clip's
        name = re.sub(r"^text_encoder\.", TEXT, str(given).removeprefix("module."))  # SLIP's
        if isinstance(tensor, Tensor) and not UNUSED.match(name):
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
    return state


def _image_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an image tower alone, named "visual.…"; a projection that is left out is the identity."""
    if not any(name.startswith("visual.") for name in state):
        state = {f"visual.{name}": tensor for name, tensor in state.items() if not UNUSED.match(f"visual.{name}")}
    state = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    if layouts.CLASS_TOKEN in state and "visual.proj" not in state:
        state["visual.proj"] = torch.eye(*state["visual.transformer.resblocks.0.attn.out_proj.weight"].shape)
    if layouts.GRID in state and not any(name.startswith("visual.attnpool.c_proj.") for name in state):
        weight = torch.eye(*state["visual.attnpool.q_proj.weight"].shape)
        state |= {"visual.attnpool.c_proj.weight": weight, "visual.attnpool.c_proj.bias": torch.zeros(len(weight))}
    return state


def _in_our_order(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Move the row of the mask to the end of what has a row for each token."""
    return {
        name: tensor[token_order(len(tensor))] if name.startswith((EMBEDDING, "text_label_predictor.")) else tensor
        for name, tensor in state.items()
    }


def _keys(state: Mapping[str, Tensor], text_heads: int | None, image_heads: int | None) -> dict[str, Any]:
    """The recipe's keys of the towers and the heads of losses."""
    if EMBEDDING not in state:
        return {**NO_TEXT, **layouts.image_keys(state, image_heads)}
    if state[EMBEDDING].shape[1] == len(state["visual.conv1.weight"]) and layouts.CLASS_TOKEN in state:
        image_heads = image_heads or text_heads
    sizes = {key: len(state[name]) for key, name in HEAD_SIZES.items() if name in state}
    return {**layouts.image_keys(state, image_heads), **layouts.text_keys(state, TEXT, text_heads, mask=True), **sizes}


def _recipe_name(state: Mapping[str, Tensor]) -> str:
    """The official recipe of the kind that the heads show."""
    late = "image_mapping.weight" in state
    if "predictor_sim.linear1.weight" in state:
        kind = "slip"
    elif "projector.linear1.weight" in state:
        kind = "defilip" if late else "declip"
    else:
        kind = "filip" if late else "clip"
    return f"{kind}-yfcc15m-vitb32"


def _known_otherwise(origin: str, state: Mapping[str, Any]) -> UserError | None:
    """Say how to load weights of another format that a path alone does not lead to."""
    folder = Path(origin).parent
    theirs = any(name.startswith("vision_model.") for name in state) and huggingface.matches(str(folder))
    if theirs or "model.logit_scale" in state:
        return UserError(f"'{origin}' holds weights that do not say what they are of. Give its folder, '{folder}'.")
    has_text = "token_embedding.weight" in state or any(name.startswith("text.") for name in state)
    if has_text and any(name.startswith("visual.") for name in state):
        return UserError(f"'{origin}' holds weights as open_clip names them. {open_clip_model.which_model(origin)}")
    return None
