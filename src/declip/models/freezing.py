"""Parts of a model that training leaves as they are."""

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from declip.models.dual_encoder import DualEncoder


def freeze(model: DualEncoder, names: Iterable[str]) -> None:
    """Take parameters out of training, and keep batch norm at its running statistics where nothing in it learns.

    Args:
        model: Changed in place. A tower whose batch norms are all frozen counts as one without: its views are encoded
            together, and chunks are exact.
        names: Of parameters.
    """
    frozen = set(names)
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        own = {f"{name}.{each}" for each, _ in module.named_parameters(recurse=False)}
        if isinstance(module, _BatchNorm) and own and own <= frozen:
            module.eval()
            module.train = _stays  # type: ignore[method-assign, assignment]
    tower = model.image_tower
    tower.has_batch_norm = any(isinstance(m, _BatchNorm) and not is_frozen(m) for m in tower.modules())


def is_frozen(module: nn.Module) -> bool:
    """Whether `freeze` keeps a batch norm at its running statistics."""
    return module.__dict__.get("train") is _stays


def _stays(mode: bool = True) -> None:
    """In place of `train` of a frozen batch norm: it stays in evaluation mode."""
