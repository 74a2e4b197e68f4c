"""AdamW, its parameter groups and moments, and the learning rate as a function of the step."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from declip.errors import UserError
from declip.recipe.schema import Train


@dataclass(frozen=True)
class LrMultiplier:
    """A parameter's learning rate relative to the recipe's.

    Attributes:
        factor: Multiplies the recipe's learning rate.
        frozen_in_warmup: Whether the parameter is frozen while new heads warm up.
    """

    factor: float = 1.0
    frozen_in_warmup: bool = False


BETAS = (0.9, 0.98)
"""AdamW's, as in DeCLIP's YFCC15M recipe."""

UNDECAYED = (
    *("positional_embedding", "position_embeddings.weight", "pos_embed"),
    *("cls_token", "class_embedding", "reg_token"),
)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to biases, norms, scales, or position and class embeddings."""
    return parameter.ndim >= 2 and not name.endswith(UNDECAYED)


def named_trainable(model: nn.Module, objective: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List all trainable parameters, named "model.…" and "objective.…", in a fixed order."""
    return [
        (f"{part}.{name}", parameter)
        for part, module in (("model", model), ("objective", objective))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], train: Train, multipliers: Mapping[str, LrMultiplier] | None = None
) -> torch.optim.AdamW:
    """Build AdamW (Loshchilov and Hutter 2019) with groups by weight decay, learning rate and sharding.

    Args:
        named: See `named_trainable`.
        train: Learning rates and constants.
        multipliers: By the same names; other parameters have the recipe's learning rate.

    Returns:
        The optimizer. Each group holds its "multiplier", see `group_lr`, and the "names" of its parameters, by which
        checkpoints keep their moments.
    """
    groups: dict[tuple[bool, bool, LrMultiplier], dict[str, nn.Parameter]]
    groups = {(decayed, False, LrMultiplier()): {} for decayed in (True, False)}
    for name, parameter in named:
        kind = (decays(name, parameter), isinstance(parameter, DTensor), (multipliers or {}).get(name, LrMultiplier()))
        groups.setdefault(kind, {})[name] = parameter
    options = [
        {
            "params": list(group.values()),
            "names": list(group),
            "weight_decay": train.weight_decay if decayed else 0.0,
            "multiplier": multiplier,
        }
        for (decayed, _, multiplier), group in groups.items()
        if group
    ]
    return torch.optim.AdamW(options, lr=train.warmup_lr, betas=BETAS, fused=True)


def learning_rate(step: int, train: Train) -> float:
    """Linear warm-up from `warmup_lr` to `lr`, then a cosine to `min_lr` (DeCLIP's YFCC15M recipe).

    The first step, 0, has `warmup_lr`, step `warmup_steps` - 1 has `lr`, the last has `min_lr`.
    """
    number, warmup = step + 1, min(train.warmup_steps, train.steps)
    if number < warmup:
        return train.warmup_lr + (train.lr - train.warmup_lr) * step / (warmup - 1)
    progress = (number - warmup) / max(train.steps - warmup, 1)
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def group_lr(lr: float, step: int, multiplier: LrMultiplier, head_warmup_steps: int, train: Train) -> float:
    """Compute the learning rate of a parameter group at a step, counted from 0, from the recipe's `lr` at that step.

    A group that is frozen in the warm-up of the heads has 0 for `head_warmup_steps` steps, and then warms up linearly.
    """
    if not multiplier.frozen_in_warmup:
        return lr * multiplier.factor
    warmed = min(1.0, (step - head_warmup_steps + 1) / max(train.warmup_steps, 1))
    return lr * multiplier.factor * max(warmed, 0.0)


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Give the moments and step counts by parameter name; learning rates and decay come from the recipe."""
    named = {name: optimizer.state.get(parameter, {}) for name, parameter in _parameters(optimizer).items()}
    return {f"{name}.{moment}": tensor for name, values in named.items() for moment, tensor in values.items()}


def load_moments(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    place: Callable[[Tensor, Tensor], Tensor] = lambda _, tensor: tensor,
) -> None:
    """Put the moments back.

    Args:
        tensors: From `moments`, not sharded.
        place: Gives a moment the layout of its parameter.

    Raises:
        UserError: a moment belongs to no parameter, or has another shape than its parameter.
    """
    parameters = _parameters(optimizer)
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, moment = key.rsplit(".", 1)
        parameter = parameters.get(name)
        shape = "nothing" if parameter is None else tuple(parameter.shape)
        if parameter is None or (moment != "step" and tensor.shape != parameter.shape):
            raise UserError(
                f"The checkpoint's moment '{key}' has shape {tuple(tensor.shape)}, and the optimizer has {shape} under "
                "that name: the checkpoint is of another model. Start a run in another folder with --out."
            )
        state.setdefault(numbers[name], {})[moment] = place(parameter, tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """List the parameters by name in the order of the groups, by which torch counts them."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
