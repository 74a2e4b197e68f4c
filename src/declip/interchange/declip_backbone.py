"""Image towers that the authors publish without a text encoder, as a model for probes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from declip.errors import UserError
from declip.interchange.declip_authors import (
    convert,
    image_sizes,
    image_width,
    load_authors_file,
    our_name,
    put_weights,
    tensors_of,
)
from declip.interchange.weights_file import outline
from declip.models.dual_encoder import DualEncoder
from declip.models.no_text import drop_text
from declip.recipe.load import load_recipe

PREFIX = "visual."
STEM = f"{PREFIX}conv1.weight"
KNOWN = (f"{PREFIX}class_embedding", f"{PREFIX}attnpool.positional_embedding")
"""One of these tells CLIP's ViT or CLIP's ResNet from any other image network."""

NO_TEXT = {"text.width": 8, "text.layers": 1, "text.heads": 1, "text.bpe_merges": 0}
"""The recipe's text tower is built and thrown away, so it is a small one."""


def is_backbone(path: Path) -> bool:
    """Whether a file holds one of CLIP's image towers and nothing of a text tower."""
    try:
        return _is_tower(_image_state(load_authors_file(path)))
    except UserError:
        return False


def read_declip_backbone(source: str | Path | Mapping[str, Any], heads: int | None = None) -> DualEncoder:
    """Build a model from an image tower alone.

    Args:
        source: A checkpoint file, what it holds, or its state dict; names with or without "module." and "visual.".
        heads: Attention heads of a vision transformer; by default one for each 64 channels.

    Returns:
        The model, in training mode, on the CPU: `encode_image` and `encode_backbone` work, and whatever needs text is
        a `UserError`. Where the file holds no projection, `encode_image` gives the pooled feature.

    Raises:
        UserError: the file cannot be read, holds more or less than an image tower, or its shapes do not fit.
    """
    state = _image_state(source if isinstance(source, Mapping) else load_authors_file(Path(source)))
    if not _is_tower(state):
        raise UserError(
            f"This is no image tower of the authors' without a text tower: it holds no {STEM}, none of "
            f"{' and '.join(KNOWN)}, or a token embedding. Give one of their visual backbones."
        )
    state = _with_projection(state)
    try:
        embed_dim = (
            state[f"{PREFIX}proj"].shape[1] if KNOWN[0] in state else len(state[f"{PREFIX}attnpool.c_proj.bias"])
        )
        recipe = load_recipe("clip-yfcc15m-vitb32", {**NO_TEXT, **image_sizes(state, heads), "embed_dim": embed_dim})
        ours = {our_name(name, state): convert(name, tensor) for name, tensor in state.items()}
    except (ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"The shapes of the image tower cannot be read: {' '.join(str(error).split())[:300]}."
        ) from error
    ours["model.logit_scale"] = torch.tensor(recipe.logit_scale.init)
    # Sizes come from the file, so the model is built without memory first, to see that the shapes fit.
    put_weights(drop_text(outline(recipe)), "model.", {name: tensor.to("meta") for name, tensor in ours.items()})
    with torch.random.fork_rng(devices=[]):
        model = drop_text(DualEncoder.from_recipe(recipe))
    put_weights(model, "model.", ours)
    return model


def _is_tower(state: Mapping[str, Tensor]) -> bool:
    return STEM in state and any(name in state for name in KNOWN)


def _image_state(found: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of an image tower, named "visual.…"; none where there is a text tower too."""
    state = tensors_of(found)
    if any("token_embedding" in name for name in state):
        return {}
    if not any(name.startswith(PREFIX) for name in state):
        state = tensors_of({f"{PREFIX}{name}": tensor for name, tensor in state.items()})
    return {name: tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def _with_projection(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Project by the identity where a file leaves the projection out."""
    width = image_width(state)
    if KNOWN[0] in state:
        return {f"{PREFIX}proj": torch.eye(width), **state}
    identity = {
        f"{PREFIX}attnpool.c_proj.weight": torch.eye(width),
        f"{PREFIX}attnpool.c_proj.bias": torch.zeros(width),
    }
    return state if identity.keys() & state.keys() else identity | state
