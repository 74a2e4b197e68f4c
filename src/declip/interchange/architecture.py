"""Weights in a recipe: the architecture that they determine, and tensors for other sizes of images and texts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.errors import UserError
from declip.interchange.weights import Weights
from declip.models.dual_encoder import DualEncoder
from declip.models.hf_encoder import ENTRY
from declip.models.layers import IMAGE, TEXT
from declip.recipe.load import flat
from declip.recipe.schema import ImageTowerConfig, LogitScale, Recipe

DROP_RATES = ("drop_rate", "drop_path_rate")  # ends of the names of timm's arguments


def architecture_of(weights: Weights, recipe: Recipe) -> Recipe:
    """Set the architecture, preprocessing, tokenizer and logit scale of a recipe to those of weights.

    Settings of training and rates of dropout are kept, and so are an image size, other preprocessing of images and
    a context length from the user.
    Without a text tower, the recipe's text tower and embedding width are kept.
    """
    changed: dict[str, Any] = {"image": _image_section(weights, recipe)}
    if weights.has_text:
        changed |= _text_sections(weights, recipe)
    fitted = recipe.model_copy(update=changed)
    # Keys that the user gave and the weights decide otherwise; a resolved recipe contains the default scale
    asked, becomes = flat(recipe.model_dump()), flat(fitted.model_dump())
    usual = ("logit_scale.init", LogitScale().init)
    overruled = [
        f"{key}={asked[key]} (becomes {becomes.get(key)})"
        for key in sorted(recipe.given & asked.keys())
        if asked[key] != becomes.get(key) and (key, asked[key]) != usual
    ]
    if overruled:
        raise UserError(
            f"The weights of '{weights.origin}' determine keys; leave them out: {', '.join(overruled)}."
        )
    return fitted


def _image_section(weights: Weights, recipe: Recipe) -> ImageTowerConfig:
    """The image tower and its preprocessing, with what the user asked for."""
    theirs, asked = weights.recipe.image, recipe.image
    keep: dict[str, Any] = {"freeze_patch_embed": asked.freeze_patch_embed}
    for name in ("size", "mean", "std", "interpolation", "crop_pct"):
        if f"image.{name}" in recipe.given:
            keep[name] = getattr(asked, name)
    # Rates of dropout, such as patch_drop_rate, change no weights.
    rates = {name: rate for name, rate in asked.model_kwargs.items() if name.endswith(DROP_RATES)}
    keep["model_kwargs"] = theirs.model_kwargs | rates
    return theirs.model_copy(update=keep)


def _text_sections(weights: Weights, recipe: Recipe) -> dict[str, Any]:
    """The text tower, the width of the shared space, and the logit scale and bias."""
    text = weights.recipe.text
    if "text.context_length" in recipe.given:
        text = text.model_copy(update={"context_length": recipe.text.context_length})
    init, limits = float(weights.tensors["logit_scale"]), recipe.logit_scale
    scale = limits.model_copy(update={"init": init, "max": max(limits.max, init)})
    changed: dict[str, Any] = {
        "text": text,
        "embed_dim": weights.recipe.embed_dim,
        "logit_scale": scale,
    }
    if "logit_bias" in weights.tensors:
        changed["logit_bias"] = float(weights.tensors["logit_bias"])
    return changed


def load_tensors(start: Weights, model: DualEncoder) -> set[str]:
    """Load the tensors of a start into a model of its recipe, resampled where they depend on a size, and name them."""
    model.image_tower.match_projection(start.tensors)
    model.text_tower.match_projection(start.tensors)
    own, fitted, old = model.state_dict(), dict[str, Tensor](), start.recipe.text.context_length
    for name, tensor in start.tensors.items():
        if name == ENTRY:  # it also has the length of captions
            fitted[name] = own[name]
        elif tensor.shape == own[name].shape:
            fitted[name] = tensor
        # Behind the rows CoCa's class token
        elif name.startswith(TEXT) and name.endswith("positional_embedding"):
            fitted[name] = torch.cat(
                [_stretched(tensor[:old], model.text_tower.context), tensor[old:]]
            )
        else:
            fitted[name] = _resized(name, tensor, own[name], model)
        if fitted[name].shape != own[name].shape:
            raise UserError(
                f"'{name}' of '{start.origin}' does not fit: this tower has one image size. Leave image.size out."
            )
    model.load_state_dict({**own, **fitted})
    return set(fitted)


def _stretched(positions: Tensor, length: int) -> Tensor:
    """Interpolate position embeddings (n, width) linearly so that both ends stay, or keep the first ones alone."""
    if length <= len(positions):
        return positions[:length]
    longer = F.interpolate(
        positions.float().mT[None], size=length, mode="linear", align_corners=True
    )
    return longer[0].mT.to(positions.dtype)


def _resized(name: str, tensor: Tensor, own: Tensor, model: DualEncoder) -> Tensor:
    """Interpolate the square grid of position embeddings for another image size; the class token's stays."""
    embeds = name.startswith(IMAGE) and name.endswith(("pos_embed", "positional_embedding"))
    if not embeds or tensor.ndim not in (2, 3):
        return tensor
    import timm

    trunk = getattr(model.image_tower.trunk, "trunk", model.image_tower.trunk)
    before = 1  # embeddings of tokens that are no patches
    if tensor.ndim == 3:
        # As of DeiT III and of DINOv2 with registers
        grid_only = getattr(trunk, "no_embed_class", False)
        before = 0 if grid_only else int(getattr(trunk, "num_prefix_tokens", 0))
    old, new = (round((embedding.shape[-2] - before) ** 0.5) for embedding in (tensor, own))
    rows = tensor.float().reshape(1, *tensor.shape[-2:])
    resized = timm.layers.resample_abs_pos_embed(
        rows, [new, new], [old, old], num_prefix_tokens=before
    )
    return resized if tensor.ndim == 3 else resized[0]
