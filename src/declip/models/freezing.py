"""Parts of a model that training leaves as they are."""

from collections.abc import Iterable
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from declip.models.dual_encoder import DualEncoder

STEM_DROPOUTS = ("pos_drop", "patch_drop")
"""Modules of timm's towers that drop out behind the patch embedding, and belong to it."""


def freeze(model: DualEncoder, names: Iterable[str]) -> None:
    """Take parameters out of training, and keep in evaluation mode the parts of a tower in which nothing learns.

    Such a part draws no dropout, and its batch norms keep their running statistics, whatever `train()` is called on.

    Args:
        model: Changed in place. A tower whose batch norms are all frozen counts as one without: its views are encoded
            together, and chunks are exact.
        names: Of parameters.
    """
    frozen = set(names)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for tower in (model.image_tower, model.text_tower):
        parts = [part for part in tower.modules() if part is not tower and _rests(part)]
        stem: Any = getattr(getattr(tower, "trunk", None), "patch_embed", None)
        if stem in parts:
            parts += [getattr(tower.trunk, name) for name in STEM_DROPOUTS if hasattr(tower.trunk, name)]
        for module in (module for part in parts for module in part.modules()):
            module.eval()
            module.train = MethodType(_stays, module)  # type: ignore[method-assign]
    tower = model.image_tower
    tower.has_batch_norm = any(isinstance(m, _BatchNorm) and not is_frozen(m) for m in tower.modules())


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` keeps a module in evaluation mode."""
    return getattr(module.__dict__.get("train"), "__func__", None) is _stays


def _rests(module: nn.Module) -> bool:
    learns = [parameter.requires_grad for parameter in module.parameters()]
    return bool(learns) and not any(learns)


def _stays(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of `train` of a frozen module: it stays in evaluation mode."""
    return module
