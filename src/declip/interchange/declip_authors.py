"""Weights of the authors' code (CLIP, SLIP, FILIP, DeCLIP, DeFILIP; arXiv 2110.05208 and 2203.05796) as ours.

Their checkpoint is ``{"last_iter", "model", "optimizer"}`` with "module." before every name. What differs:
their vocabulary has ``<|mask|>`` before start and end, ours has it last; their image projection lies transposed;
their queue is not saved. The sizes are read off the shapes, all but the number of heads.
"""

import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.errors import UserError, unknown
from declip.interchange.clip_layout import RESNET_NAMES, VIT_NAMES, Names, merges_key, rename
from declip.interchange.weights_file import outline, read_weights
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.supervision.objective import TERMS, Objective

SPECIAL = 3
"""Ids at the end of their vocabulary: mask, start, end. Ours: start, end, mask."""

UNUSED = re.compile(r"visual\.fc\.|predictor_sim\.bn3\.|projector_text\.")
"""What their models hold and never use."""

HEADS = {
    "simsiam": "projector.linear1.weight",
    "masked_language": "text_label_predictor.weight",
    "simclr": "predictor_sim.linear1.weight",
    "late_interaction": "image_mapping.weight",
}
"""A name by which the head of a term is known; the other terms have none."""

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
"""Ours and theirs, but for the image tower's, which are CLIP's."""


def read_declip_authors(
    source: str | Path | Mapping[str, Any],
    weights: Mapping[str, float] | None = None,
    text_heads: int | None = None,
    image_heads: int | None = None,
    queue_size: int = 65_536,
) -> tuple[DualEncoder, Objective]:
    """Build the model and the objective that the authors' weights belong to.

    The rest of the recipe (`objective.recipe`) is the published one of the same kind, with the authors' choices
    switched on: shared pass of the masked caption, selection of 16 tokens with padding counted, frozen patches.

    Args:
        source: A checkpoint file (``.pth.tar``, ``.pth``, ``.pt`` or ``.safetensors``; never unpickled into code),
            what such a file holds, or its state dict, names with or without "module.".
        weights: Term name → weight. By default those of the authors' code.
        text_heads: Attention heads of the text tower; by default one for each 64 channels.
        image_heads: The same for a vision transformer; by default `text_heads` where both towers are equally
            wide, else one for each 64 channels.
        queue_size: Slots of the queue, which is empty: the authors do not save theirs.

    Returns:
        The model and the objective, in training mode, on the CPU, in float32. A logit scale above ln 100, which
        theirs cuts off in the forward pass, is brought down to it.

    Raises:
        UserError: The file cannot be read, is none of the authors', or lacks the head of a weighted term.
    """
    state = _state(source)
    try:
        recipe = _recipe(state, weights, text_heads, image_heads, queue_size)
        places = {our_name(name, state): name for name in state}
        shapes = {ours: convert(name, state[name].to("meta")) for ours, name in places.items()}
    except UserError:
        raise
    except (ValueError, TypeError, IndexError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"The shapes of the authors' weights cannot be read: {_one_line(error)}.") from error
    # Sizes come from the file, so the model is built without memory first, to see that the shapes fit.
    put_weights(outline(recipe), "model.", shapes)
    with torch.random.fork_rng(devices=[]):
        model = DualEncoder.from_recipe(recipe)
        objective = Objective(recipe, model)
    ours = {ours: convert(name, state[name]) for ours, name in places.items()}
    ours["model.logit_scale"] = ours["model.logit_scale"].clamp(max=recipe.logit_scale.max)
    put_weights(model, "model.", ours)
    put_weights(objective, "objective.", ours)
    return model, objective


def our_name(name: str, state: Mapping[str, Any]) -> str:
    """Give the place of one of their tensors: "model.…" or "objective.…".

    Args:
        name: Their name, without "module.".
        state: All their names; a class embedding among them tells a ViT from a ResNet.

    Raises:
        UserError: The name is none of theirs.
    """
    if name.startswith("visual."):
        table = VIT_NAMES if "visual.class_embedding" in state else RESNET_NAMES
        theirs = name.removeprefix("visual.")
        ours = rename(theirs, table, back=True)
        renamed = f"model.image_tower.{ours}" if ours != theirs else name
    else:
        renamed = rename(name, NAMES, back=True)
    if renamed == name:
        raise UserError(
            f"'{name}' is not a tensor of the authors' CLIP, SLIP, FILIP, DeCLIP or DeFILIP with a ViT or a ResNet "
            "as image tower. Give one of their checkpoints."
        )
    return renamed


def token_order(vocabulary: int) -> Tensor:
    """For each of our token ids, the id that the authors give the same token: (vocabulary,) int64."""
    mask, start, end = range(vocabulary - SPECIAL, vocabulary)
    return torch.cat([torch.arange(mask), torch.tensor([start, end, mask])])


def _state(source: str | Path | Mapping[str, Any]) -> dict[str, Tensor]:
    """Get the state dict of a whole model out of what was given."""
    found = source if isinstance(source, Mapping) else load_authors_file(Path(source))
    state = tensors_of(found)
    needed = ("logit_scale", "visual.conv1.weight", f"{_text_prefix(state)}token_embedding.weight")
    missing = [name for name in needed if name not in state]
    if missing:
        raise UserError(
            f"These are not the authors' weights: {', '.join(missing)} not found. Give a checkpoint of their code "
            '(a file, or {"model": {name: tensor}}), or its state dict.'
        )
    return state


def tensors_of(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """Get the named tensors out of what a file held, names without "module.", without what the models never use."""
    found = found.get("model", found)
    tensors = isinstance(found, Mapping) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in found.items())
    state = {name.removeprefix("module."): tensor for name, tensor in found.items()} if tensors else {}
    return {name: tensor for name, tensor in state.items() if not UNUSED.match(name)}


def load_authors_file(path: Path) -> Mapping[str, Any]:
    """Read what a checkpoint file holds; no code in it is run.

    Raises:
        UserError: there is no such file, or it holds no tensors, half of them or a program.
    """
    if not path.is_file():
        raise UserError(f"There is no file '{path}'. Give the path of a checkpoint of the authors' code.")
    if path.suffix == ".onnx":
        raise UserError(
            f"'{path}' is an ONNX file, which is a program for a runtime. Give weights of the authors' code."
        )
    try:
        found = read_weights(path)
    except UserError:
        raise
    except Exception as error:  # a file can be wrong in any way
        # torch's own message advises `weights_only=False`, which would let the file run code.
        unsafe = isinstance(error, pickle.UnpicklingError)
        why = "it is no file of tensors, or it holds more than tensors." if unsafe else _one_line(error, 200)
        raise UserError(
            f"Cannot read weights from '{path}': {why} Give a checkpoint as the authors' code "
            "saves it, or a safetensors file; download it again if it is cut."
        ) from error
    if not isinstance(found, Mapping):
        raise UserError(f"'{path}' holds a {type(found).__name__}, not a checkpoint of the authors' code.")
    return found


def _text_prefix(state: Mapping[str, Any]) -> str:
    """SLIP's text tower is called otherwise than everyone else's."""
    return "text_encoder." if "text_encoder.token_embedding.weight" in state else "encode_text."


def convert(name: str, tensor: Tensor) -> Tensor:
    """Bring one of their tensors into our order and shape."""
    if name.endswith("token_embedding.weight") or name.startswith("text_label_predictor."):
        return tensor[token_order(len(tensor))]
    if name == "visual.proj":
        return tensor.T
    if name == "visual.class_embedding":
        return tensor.reshape(1, 1, -1)
    if name == "visual.positional_embedding":
        return tensor.unsqueeze(0)
    return tensor.reshape(()) if name == "logit_scale" else tensor


def put_weights(module: torch.nn.Module, prefix: str, ours: Mapping[str, Tensor]) -> None:
    """Load what is ours under a prefix; heads of terms without a weight are left aside, and the queue empty.

    Raises:
        UserError: a tensor is missing, too many, or of another shape.
    """
    parts = {_head(name) for name, _ in module.named_parameters()}
    given = {name.removeprefix(prefix): t for name, t in ours.items() if name.startswith(prefix)}
    given = {name: tensor for name, tensor in given.items() if _head(name) in parts}
    try:
        missing, unexpected = module.load_state_dict(given, strict=False)
    except RuntimeError as error:
        raise UserError("The shapes of the authors' weights do not fit together: " + _one_line(error)) from error
    wrong = {
        "missing": [name for name in missing if ".queue." not in name],
        "not ours": unexpected,
    }
    problems = [f"{problem}: {', '.join(names)}" for problem, names in wrong.items() if names]
    if problems:
        raise UserError(f"The authors' weights are not complete, under our names {'; '.join(problems)}.")


def _head(name: str) -> str:
    """The tower or the term that a tensor belongs to."""
    return ".".join(name.split(".")[: 2 if name.startswith("losses.") else 1])


def _one_line(error: Exception, longest: int = 600) -> str:
    return " ".join(str(error).split())[:longest] or type(error).__name__


def _recipe(
    state: Mapping[str, Tensor],
    weights: Mapping[str, float] | None,
    text_heads: int | None,
    image_heads: int | None,
    queue_size: int,
) -> Recipe:
    """The published recipe of the kind that the heads show, with this file's sizes and the given weights."""
    changes: dict[str, Any] = {
        **_text_sizes(state, text_heads),
        **_head_sizes(state),
        "nearest_neighbor.queue_size": queue_size,
    }
    text_width = state[f"{_text_prefix(state)}token_embedding.weight"].shape[1]
    alike = text_heads if image_width(state) == text_width else None
    changes |= image_sizes(state, image_heads, alike)
    if weights is not None:
        _check_weights(state, weights)
        changes["loss_weights"] = dict(weights)
    return load_recipe(f"{_kind(state)}-yfcc15m-vitb32", changes)


def _kind(state: Mapping[str, Tensor]) -> str:
    """Which of the authors' classes has these heads."""
    if HEADS["simclr"] in state:
        return "slip"
    late = HEADS["late_interaction"] in state
    if HEADS["simsiam"] in state:
        return "defilip" if late else "declip"
    return "filip" if late else "clip"


def _check_weights(state: Mapping[str, Tensor], weights: Mapping[str, float]) -> None:
    for term, weight in weights.items():
        if term not in TERMS:
            raise unknown("term", term, TERMS)
        if weight > 0 and term in HEADS and HEADS[term] not in state:
            there = [name for name in TERMS if HEADS.get(name, "logit_scale") in state]
            raise UserError(
                f"{term} has the weight {weight}, but these weights hold no head for it. "
                f"They hold what is needed for: {', '.join(there)}. Set weights.{term} to 0."
            )


def _text_sizes(state: Mapping[str, Tensor], heads: int | None) -> dict[str, Any]:
    prefix = _text_prefix(state)
    vocabulary, width = state[f"{prefix}token_embedding.weight"].shape
    return {
        "text.width": width,
        "text.layers": _count(state, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\."),
        "text.heads": heads or _one_per_64(width),
        "text.context_length": len(state[f"{prefix}positional_embedding"]),
        "text.bpe_merges": merges_key(vocabulary - 1),
        "text.projection_bias": f"{prefix}text_projection.bias" in state,
        "embed_dim": len(state[f"{prefix}text_projection.weight"]),
    }


def image_width(state: Mapping[str, Tensor]) -> int:
    """Width of an image tower's pooled feature."""
    if "visual.class_embedding" in state:
        return state["visual.conv1.weight"].shape[0]
    if "visual.attnpool.positional_embedding" not in state:
        raise UserError("The image tower is neither CLIP's ViT nor CLIP's ResNet; only these two can be read.")
    return state["visual.attnpool.positional_embedding"].shape[1]


def image_sizes(state: Mapping[str, Tensor], heads: int | None, alike: int | None = None) -> dict[str, Any]:
    """Read the recipe's keys of an image tower off its shapes.

    Args:
        state: Their tensors.
        heads: Attention heads, where they were given.
        alike: Those of an equally wide text tower, where they were given; they serve a vision transformer.

    Raises:
        UserError: it is neither CLIP's ViT nor CLIP's ResNet.
    """
    width = image_width(state)
    if "visual.class_embedding" not in state:
        return _resnet_sizes(state, width, heads)
    heads = heads or alike or _one_per_64(width)
    patch = state["visual.conv1.weight"].shape[-1]
    side = math.isqrt(len(state["visual.positional_embedding"]) - 1)
    depth = _count(state, r"visual\.transformer\.resblocks\.(\d+)\.")
    return {
        "image.model": "vit_base_patch32_clip_quickgelu_224",
        "image.size": side * patch,
        "image.model_kwargs": {"patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads},
    }


def _resnet_sizes(state: Mapping[str, Tensor], width: int, heads: int | None) -> dict[str, Any]:
    cells = len(state["visual.attnpool.positional_embedding"])
    if heads is not None and heads != _one_per_64(width):
        raise UserError(f"image_heads={heads} was given; a ResNet of width {width} pools with {_one_per_64(width)}.")
    depths = [_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    return {
        "image.model": "resnet50_clip",
        "image.size": 32 * math.isqrt(cells - 1),
        "image.model_kwargs": {"depths": depths, "width_factor": width / 2048},
        "image.freeze_patch_embed": False,
    }


def _head_sizes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Rows of a weight are its layer's output width."""
    rows = {
        "simsiam.hidden": "projector.linear1.weight",
        "simsiam.out": "projector.linear3.weight",
        "simsiam.predictor_hidden": "predictor.linear1.weight",
        "simclr.hidden": "predictor_sim.linear1.weight",
        "simclr.out": "predictor_sim.linear3.weight",
        "late_interaction.width": "image_mapping.weight",
    }
    return {key: len(state[name]) for key, name in rows.items() if name in state}


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many different numbers a pattern finds at the front of the names."""
    return len({found[1] for found in map(re.compile(pattern).match, state) if found})


def _one_per_64(width: int) -> int:
    return max(width // 64, 1)
