"""Freezing of parameters, and of the modules in which none is left to train."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from declip.models.dual_encoder import DualEncoder

STEM_DROPOUTS = ("pos_drop", "patch_drop")
"""Dropouts of timm's towers behind the patch embedding; they belong to it."""


def freeze(model: DualEncoder, names: Iterable[str]) -> None:
    """Take parameters out of training, and keep fully frozen modules in evaluation mode whatever `train()` says.

    Such a module drops nothing out, and its batch norms keep their running statistics. A tower whose batch norms are
    all frozen counts as one without: its views are encoded together, and chunks are exact.
    """
    frozen = set(names)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for tower in (model.image_tower, model.text_tower):
        parts = [part for part in tower.modules() if part is not tower and _fully_frozen(part)]
        stem: Any = getattr(getattr(tower, "trunk", None), "patch_embed", None)
        if stem in parts:
            parts += [getattr(tower.trunk, name) for name in STEM_DROPOUTS if hasattr(tower.trunk, name)]
        keep_in_evaluation(model, [module for part in parts for module in part.modules()])


def keep_in_evaluation(model: DualEncoder, modules: Iterable[nn.Module]) -> None:
    """Keep modules of a model in evaluation mode whatever `train()` says; their parameters may learn."""
    for module in modules:
        module.always_eval = True  # type: ignore[assignment]  # `DualEncoder.train` looks for it
    model.train(model.training)
    tower = model.image_tower
    tower.has_batch_norm = any(isinstance(m, _BatchNorm) and not is_frozen(m) for m in tower.modules())


def is_frozen(module: nn.Module) -> bool:
    """Whether a module is kept in evaluation mode."""
    return getattr(module, "always_eval", False)


def _fully_frozen(module: nn.Module) -> bool:
    trainable = [parameter.requires_grad for parameter in module.parameters()]
    return bool(trainable) and not any(trainable)
