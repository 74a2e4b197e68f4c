"""Precision of a model in use: float32, or converted to bfloat16 or float16."""

import logging
from collections.abc import Callable
from copy import deepcopy
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from declip.errors import UserError, unknown
from declip.models.device import computes_bf16
from declip.models.dual_encoder import DualEncoder
from declip.models.encoder import Encoder
from declip.models.fingerprint import PROBE, fingerprint
from declip.models.folding import folded, inference_tower, noise
from declip.models.image_tower import BatchNorm, ImageTower
from declip.models.neighbors import NeighborProjection
from declip.models.text_tower import AnyTextTower

log = logging.getLogger("declip")
Precision = Literal["auto", "fp32", "bf16", "fp16"]
Tower = TypeVar("Tower", bound=nn.Module)
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

LARGEST_CHANGE = 0.02
"""Largest cosine distance between a tower's features before and after. Of random pixels, EfficientNet-Lite0's is 0.001
in bfloat16, that of other towers below 0.0002."""


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The type that a precision means on a device; raises `UserError` for one that the device would emulate."""
    if precision not in get_args(Precision):
        raise unknown("precision", precision, get_args(Precision))
    bf16 = computes_bf16(device)
    fp16 = device.type in ("cuda", "mps")
    if precision == "auto":
        if bf16:
            return torch.bfloat16
        if device.type == "cuda":
            return torch.float16
        return torch.float32
    computed = {"fp32": True, "bf16": bf16, "fp16": fp16}
    if not computed[precision]:
        allowed = ", ".join(
            ["auto", *(name for name, is_computed in computed.items() if is_computed)]
        )
        raise UserError(
            f"The device '{device}' does not compute in {precision} itself. Give --precision {allowed}."
        )
    return TYPES[precision]


def precision_of(model: Encoder) -> str:
    """The precision that a model computes images in; empty without weights."""
    modules = model.modules()
    if isinstance(model, DualEncoder):
        modules = iter([model.image_tower] if model.has_image else [])
    whole = next(modules, None)  # a module comes before its parts
    if whole is None:
        return ""
    names = {kind: name for name, kind in TYPES.items()}
    weight = next(whole.parameters(), None)
    if weight is None:
        return ""
    return names.get(weight.dtype, str(weight.dtype))


@torch.no_grad()
def convert(model: DualEncoder, precision: str) -> DualEncoder:
    """Convert the towers of a float32 model in place, batch norm folded into convolutions; for inference alone.

    The logit scale stays float32, and so does what is left of batch norm. A tower whose features change too much, or
    that cannot compute in the type, stays float32 with "auto"; otherwise this raises a `UserError`.
    """
    dtype = pick_precision(precision, model.device)
    if dtype == torch.float32:
        return model
    model.float32_fingerprint = fingerprint(model)
    strict = precision != "auto"
    if model.has_image:
        model.image_tower = _converted_image_tower(model, dtype, strict)
    if model.has_text:
        model.text_tower = _converted_text_tower(model, dtype, strict)
    return model


def _converted_image_tower(model: DualEncoder, dtype: torch.dtype, strict: bool) -> ImageTower:
    images = noise(model)
    tower = folded(model)
    before = model.image_tower(images).pooled
    converted = _checked(
        "image", tower, dtype, before, lambda tower: tower(_like(images, tower)).pooled, strict
    )
    if converted is None:
        return model.image_tower
    return converted


def _converted_text_tower(model: DualEncoder, dtype: torch.dtype, strict: bool) -> AnyTextTower:
    tokens = model.tokenize([PROBE, "a"])
    before = model.text_tower(tokens).pooled
    converted = _checked(
        "text", model.text_tower, dtype, before, lambda tower: tower(tokens).pooled, strict
    )
    if converted is None:
        return model.text_tower
    return converted


@torch.no_grad()
def pooling_tower(model: DualEncoder, dtype: torch.dtype) -> ImageTower:
    """A copy of a float32 model's image tower in another type, for `pool` alone, or in float32, see `convert`."""
    if dtype == torch.float32:
        return inference_tower(model)
    images = noise(model)
    tower = folded(model)
    before = tower.pool(images)
    converted = _checked(
        "image", tower, dtype, before, lambda tower: tower.pool(_like(images, tower)), strict=False
    )
    if converted is None:
        return tower
    return converted


def _checked(
    name: str,
    tower: Tower,
    dtype: torch.dtype,
    before: Tensor,
    features: Callable[[Tower], Tensor],
    strict: bool,
) -> Tower | None:
    """A copy of a tower in a type, or None with a warning if its features change too much or cannot be computed.

    With `strict` a `UserError` instead of None.
    """
    problem = ""
    try:
        converted = _cast(tower, dtype)
        after = features(converted).float()
    # A tower of another library may fix a type
    except (RuntimeError, TypeError, ValueError) as error:
        problem = str(error).splitlines()[0]
    else:
        smallest = float(cosine_similarity(before.float(), after).min())
        if smallest >= 1 - LARGEST_CHANGE:
            return converted
        problem = f"its features change too much (cosine {smallest:.3f})"
    type_name = str(dtype).removeprefix("torch.")
    problem = f"The {name} tower cannot compute in {type_name}: {problem}."
    if strict:
        raise UserError(f"{problem} Give --precision auto or fp32.")
    log.warning("%s It computes in float32.", problem)
    return None


def _like(images: Tensor, tower: nn.Module) -> Tensor:
    return images.to(next(tower.parameters()).dtype)


def _cast(tower: Tower, dtype: torch.dtype) -> Tower:
    """A copy in a type; what is left of batch norm stays float32, as variances may be far from 1."""
    copy = deepcopy(tower).requires_grad_(False).to(dtype)
    for module in copy.modules():
        if isinstance(module, BatchNorm | NeighborProjection):
            module.float()
    return copy
