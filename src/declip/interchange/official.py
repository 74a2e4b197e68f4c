"""Checkpoints of the official implementation (CLIP, SLIP, FILIP, DeCLIP, DeFILIP; arXiv 2110.05208 and 2203.05796).

A checkpoint is ``{"last_iter", "model", "optimizer"}`` with "module." before every name. What differs: its vocabulary
has ``<|mask|>`` before start and end, ours has it last; its image projection lies transposed; its queue is not saved.
The sizes are read off the shapes, except for the number of attention heads. A file may hold the image tower alone, with
or without its projection.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.errors import UserError, unknown
from declip.interchange import huggingface, open_clip_model
from declip.interchange.clip_layout import RESNET_NAMES, VIT_NAMES, Names, merges_key, rename
from declip.interchange.files import read_tensors
from declip.interchange.weights import NO_TEXT, Weights, first_difference, one_line, without_queue
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.runs.checkpoint import part
from declip.supervision.objective import TERMS, Objective

SPECIAL = 3
"""Ids at the end of the official vocabulary: mask, start, end. Ours: start, end, mask."""

UNUSED = re.compile(r"visual\.fc\.|predictor_sim\.bn3\.|projector_text\.")
"""Tensors that the official models hold and never use."""

HEADS = {
    "simsiam": "projector.linear1.weight",
    "masked_language": "text_label_predictor.weight",
    "simclr": "predictor_sim.linear1.weight",
    "late_interaction": "image_mapping.weight",
}
"""A tensor by which the head of a loss is known; the other losses have no head."""

HEAD_SIZES = {
    "simsiam.hidden": "projector.linear1.weight",
    "simsiam.out": "projector.linear3.weight",
    "simsiam.predictor_hidden": "predictor.linear1.weight",
    "simclr.hidden": "predictor_sim.linear1.weight",
    "simclr.out": "predictor_sim.linear3.weight",
    "late_interaction.width": "image_mapping.weight",
}
"""Recipe key → the layer whose output width it is."""

NAMES: Names = (
    ("model.logit_scale", "logit_scale"),
    ("model.text_tower.", "encode_text."),
    ("model.text_tower.", "text_encoder."),
    ("objective.terms.simsiam.projector.norm#.", "projector.bn#."),
    ("objective.terms.simsiam.projector.", "projector."),
    ("objective.terms.simsiam.predictor.norm#.", "predictor.bn#."),
    ("objective.terms.simsiam.predictor.linear2.", "predictor.layer2."),
    ("objective.terms.simsiam.predictor.", "predictor."),
    ("objective.terms.simclr.head.norm#.", "predictor_sim.bn#."),
    ("objective.terms.simclr.head.", "predictor_sim."),
    ("objective.terms.masked_language.head.", "text_label_predictor."),
    ("objective.terms.late_interaction.patch_projection.", "image_mapping."),
    ("objective.terms.late_interaction.word_projection.", "text_mapping."),
    ("objective.terms.late_interaction.logit_scale", "logit_scale_dense"),
)
"""Our names and the official ones, except for the image tower's, which are CLIP's."""

CLASS_TOKEN, GRID = "visual.class_embedding", "visual.attnpool.positional_embedding"
"""One of these distinguishes CLIP's ViT and CLIP's ResNet from any other image network."""


def matches(where: str) -> bool:
    """Whether a path is a file; the other formats that are single files are recognized before this one."""
    return Path(where).expanduser().is_file()  # a pipe would be waited for


def read(where: str, text_heads: int | None = None, image_heads: int | None = None) -> Weights:
    """Read a checkpoint: both towers and the heads, or an image tower alone.

    Args:
        where: The file: ``.pth.tar``, ``.pth``, ``.pt`` or ``.safetensors``; no code in it is run.
        text_heads: Attention heads of the text tower; by default one for each 64 channels.
        image_heads: The same for a vision transformer; by default `text_heads` where both towers are equally wide.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    return weights_of(read_tensors(Path(where).expanduser()), where, text_heads, image_heads)


def weights_of(content: Any, origin: str, text_heads: int | None = None, image_heads: int | None = None) -> Weights:
    """Convert what a checkpoint holds; arguments and errors as `read`.

    Args:
        content: A checkpoint, or its state dict; names with or without "module.", of an image tower also without
            "visual.".
        origin: Where it came from.
    """
    state = _tensors_of(content)
    try:
        if any("token_embedding" in name for name in state):
            recipe = _recipe(state, text_heads, image_heads)
        else:
            state = _image_tower(state)
            width = state["visual.proj"].shape[1] if CLASS_TOKEN in state else len(state["visual.attnpool.c_proj.bias"])
            sizes = NO_TEXT | _image_sizes(state, image_heads) | {"embed_dim": width}
            recipe = load_recipe("clip-yfcc15m-vitb32", sizes)
        tensors = {our_name(name, state): convert(name, tensor) for name, tensor in state.items()}
    except UserError as error:
        raise _known_otherwise(origin, state) or UserError(f"'{origin}': {str(error).rstrip('.')}.") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"The shapes of the weights in '{origin}' cannot be read: {one_line(error)}.") from error
    # The official forward pass cuts a larger scale off.
    scale = tensors.get("model.logit_scale", torch.tensor(recipe.logit_scale.init))
    tensors["model.logit_scale"] = scale.clamp(max=recipe.logit_scale.max)
    return Weights(recipe, part("model", tensors), origin, part("objective", tensors)).check()


def read_official(
    source: str | Path | Mapping[str, Any],
    loss_weights: Mapping[str, float] | None = None,
    text_heads: int | None = None,
    image_heads: int | None = None,
    queue_size: int = 65_536,
) -> tuple[DualEncoder, Objective]:
    """Build the model and the objective of a checkpoint, with the official recipe of the same kind.

    Args:
        source: A checkpoint file, its content, or its state dict.
        loss_weights: Loss → weight; by default the official ones.
        text_heads, image_heads: See `read`.
        queue_size: Slots of the queue, which is empty: a checkpoint does not hold it.

    Returns:
        The model and the objective, in training mode, on the CPU, in float32.

    Raises:
        UserError: the file cannot be read, holds no whole model, or lacks the head of a weighted loss.
    """
    if isinstance(source, Mapping):
        weights = weights_of(source, "the state dict", text_heads, image_heads)
    else:
        weights = read(str(source), text_heads, image_heads)
    if not weights.whole:
        raise UserError(f"'{weights.origin}' holds an image tower alone. Give both towers, or use declip.load.")
    recipe = weights.recipe
    active = loss_weights if loss_weights is not None else recipe.loss_weights
    _check_heads(weights, active)
    queue = recipe.nearest_neighbor.model_copy(update={"queue_size": queue_size})
    recipe = recipe.model_copy(update={"loss_weights": dict(active), "nearest_neighbor": queue})
    model = Weights(recipe, weights.tensors, weights.origin).build()
    with torch.random.fork_rng(devices=[]):
        objective = Objective(recipe, model)
    own = without_queue(objective.state_dict())
    terms = tuple(f"terms.{name}." for name in objective.terms)
    heads = {name: tensor for name, tensor in weights.heads.items() if name.startswith(terms)}
    if difference := first_difference(own, heads):
        raise UserError(f"The heads in '{weights.origin}' are not whole: {difference}.")
    objective.load_state_dict(heads, strict=False)
    return model, objective


def our_name(name: str, state: Mapping[str, Any]) -> str:
    """Translate a name of an official state, without "module.", to "model.…" or "objective.…"."""
    if name.startswith("visual."):
        table = VIT_NAMES if CLASS_TOKEN in state else RESNET_NAMES
        bare = name.removeprefix("visual.")
        ours = rename(bare, table, back=True)
        renamed = f"model.image_tower.{ours}" if ours != bare else name
    else:
        renamed = rename(name, NAMES, back=True)
    if renamed == name:
        raise UserError(
            f"'{name}' is not a tensor of the official CLIP, SLIP, FILIP, DeCLIP or DeFILIP with a ViT or a ResNet as "
            "image tower. Give one of their checkpoints."
        )
    return renamed


def token_order(vocabulary: int) -> Tensor:
    """For each of our token ids, the official id of the same token: (vocabulary,) int64."""
    mask, start, end = range(vocabulary - SPECIAL, vocabulary)
    return torch.cat([torch.arange(mask), torch.tensor([start, end, mask])])


def convert(name: str, tensor: Tensor) -> Tensor:
    """Bring an official tensor into our order and shape, and floats to float32."""
    tensor = tensor.float() if tensor.is_floating_point() else tensor
    if name.endswith("token_embedding.weight") or name.startswith("text_label_predictor."):
        return tensor[token_order(len(tensor))]
    if name == "visual.proj":
        return tensor.T
    if name == CLASS_TOKEN:
        return tensor.reshape(1, 1, -1)
    if name == "visual.positional_embedding":
        return tensor.unsqueeze(0)
    return tensor.reshape(()) if name == "logit_scale" else tensor


def _tensors_of(content: Any) -> dict[str, Tensor]:
    """The named tensors of a checkpoint or a state dict, names without "module.", without unused ones."""
    content = content.get("model", content) if isinstance(content, Mapping) else {}
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        # open_clip's training saves {"state_dict": …}: the names say what it is.
        content = content.get("state_dict") if isinstance(content, Mapping) else {}
        content = content if isinstance(content, Mapping) else {}
    state = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    return {name: t for name, t in state.items() if isinstance(t, Tensor) and not UNUSED.match(name)}


def _image_tower(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of an image tower alone, named "visual.…"; a projection that is left out is the identity."""
    if not any(name.startswith("visual.") for name in state):
        state = {f"visual.{name}": t for name, t in state.items() if not UNUSED.match(f"visual.{name}")}
    state = {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
    if "visual.conv1.weight" not in state or not {CLASS_TOKEN, GRID} & state.keys():
        raise UserError(
            "these are not weights of the official implementation: neither encode_text.token_embedding.weight nor the "
            "image tower of a CLIP is there. Give a checkpoint of that code, or its state dict"
        )
    width = _image_width(state)
    if CLASS_TOKEN in state:
        return {"visual.proj": torch.eye(width), **state}
    projection = {"weight": torch.eye(width), "bias": torch.zeros(width)}
    identity = {f"visual.attnpool.c_proj.{name}": tensor for name, tensor in projection.items()}
    return state if identity.keys() & state.keys() else identity | state


def _known_otherwise(origin: str, state: Mapping[str, Any]) -> UserError | None:
    """Say how to load weights of another format that a path alone does not lead to."""
    folder = Path(origin).parent
    if "model.logit_scale" in state and any(name.startswith("model.image_tower.") for name in state):
        return UserError(f"'{origin}' holds the weights of a checkpoint. Give its folder, '{folder}', or its run.")
    if any(name.startswith("vision_model.") for name in state) and huggingface.matches(str(folder)):
        return UserError(f"'{origin}' holds weights as transformers names them. Give its folder, '{folder}'.")
    has_text = "token_embedding.weight" in state or any(name.startswith("text.") for name in state)
    if has_text and any(name.startswith("visual.") for name in state):
        return UserError(f"'{origin}' holds weights as open_clip names them. {open_clip_model.which_model(origin)}")
    return None


def _recipe(state: Mapping[str, Tensor], text_heads: int | None, image_heads: int | None) -> Recipe:
    """The official recipe of the kind that the heads show, with this file's sizes."""
    prefix = "text_encoder." if "text_encoder.token_embedding.weight" in state else "encode_text."  # SLIP's, others'
    needed = ("logit_scale", "visual.conv1.weight", f"{prefix}token_embedding.weight")
    if missing := [name for name in needed if name not in state]:
        raise UserError(
            f"these are not weights of the official implementation: {', '.join(missing)} not found. Give a checkpoint "
            'of that code (a file, or {"model": {name: tensor}}), or its state dict'
        )
    vocabulary, width = state[f"{prefix}token_embedding.weight"].shape
    alike = text_heads if _image_width(state) == width else None
    changes: dict[str, Any] = {
        "text.width": width,
        "text.layers": _count(state, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\."),
        "text.heads": text_heads or _one_per_64(width),
        "text.context_length": len(state[f"{prefix}positional_embedding"]),
        "text.bpe_merges": merges_key(vocabulary - 1),
        "text.projection_bias": f"{prefix}text_projection.bias" in state,
        "embed_dim": len(state[f"{prefix}text_projection.weight"]),
        **{key: len(state[name]) for key, name in HEAD_SIZES.items() if name in state},
        **_image_sizes(state, image_heads, alike),
    }
    late = HEADS["late_interaction"] in state
    kind = ("defilip" if late else "declip") if HEADS["simsiam"] in state else ("filip" if late else "clip")
    return load_recipe(f"{'slip' if HEADS['simclr'] in state else kind}-yfcc15m-vitb32", changes)


def _check_heads(weights: Weights, loss_weights: Mapping[str, float]) -> None:
    there = [n for n in TERMS if n not in HEADS or any(name.startswith(f"terms.{n}.") for name in weights.heads)]
    for name, weight in loss_weights.items():
        if name not in TERMS:
            raise unknown("loss", name, TERMS)
        if weight > 0 and name not in there:
            raise UserError(
                f"{name} has the weight {weight}, but '{weights.origin}' holds no head for it. It holds what is needed "
                f"for: {', '.join(there)}. Set loss_weights.{name} to 0."
            )


def _image_width(state: Mapping[str, Tensor]) -> int:
    """Width of an image tower's pooled feature."""
    if CLASS_TOKEN in state:
        return state["visual.conv1.weight"].shape[0]
    if GRID not in state:
        raise UserError("the image tower is neither CLIP's ViT nor CLIP's ResNet; only these two can be read")
    return state[GRID].shape[1]


def _image_sizes(state: Mapping[str, Tensor], heads: int | None, alike: int | None = None) -> dict[str, Any]:
    """Read the recipe's keys of an image tower off its shapes; `alike`: the heads of an equally wide text tower."""
    width = _image_width(state)
    if CLASS_TOKEN in state:
        patch = state["visual.conv1.weight"].shape[-1]
        side = math.isqrt(len(state["visual.positional_embedding"]) - 1)
        depth, heads = _count(state, r"visual\.transformer\.resblocks\.(\d+)\."), heads or alike or _one_per_64(width)
        return {
            "image.model": "vit_base_patch32_clip_quickgelu_224",
            "image.size": side * patch,
            "image.model_kwargs": {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads},
        }
    if heads is not None and heads != _one_per_64(width):
        raise UserError(f"image_heads={heads} was given; a ResNet of width {width} pools with {_one_per_64(width)}")
    depths = [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    return {
        "image.model": "resnet50_clip",
        "image.size": 32 * math.isqrt(len(state[GRID]) - 1),
        "image.model_kwargs": {"depths": depths, "width_factor": width / 2048},
        "image.freeze_patch_embed": False,
    }


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """Count the different numbers that a pattern finds at the start of the names."""
    return len({match[1] for match in map(re.compile(pattern).match, state) if match})


def _one_per_64(width: int) -> int:
    return max(width // 64, 1)
