"""AdamW, which parameters it decays, and how fast each learns."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from declip.recipe.schema import Train


@dataclass(frozen=True)
class LrMultiplier:
    """How a parameter follows the recipe's learning rate.

    Attributes:
        factor: On that rate.
        waits: Whether it stands still while the heads are warmed up.
    """

    factor: float = 1.0
    waits: bool = False


UNDECAYED = (
    *("positional_embedding", "position_embeddings.weight", "pos_embed"),
    *("cls_token", "class_embedding", "reg_token"),
)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to biases, norms, scales, or embeddings of positions."""
    return parameter.ndim >= 2 and not name.endswith(UNDECAYED)


def named_trainable(model: nn.Module, objective: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters that learn, named "model.…" and "objective.…", in a fixed order."""
    return [
        (f"{part}.{name}", parameter)
        for part, module in (("model", model), ("objective", objective))
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]], train: Train, paces: Mapping[str, LrMultiplier] | None = None
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) with groups by decay and pace, each parted where some are shards.

    Args:
        named: What learns, see `named_trainable`.
        train: Rates and constants.
        paces: By the same names; the others follow the recipe's rate.

    Returns:
        The optimizer; each group holds its "pace", by which `declip.training.schedule.paced` sets its rate, and the
        "names" of its parameters, by which checkpoints keep their moments.
    """
    groups: dict[tuple[bool, bool, LrMultiplier], list[tuple[str, nn.Parameter]]]
    groups = {(decayed, False, LrMultiplier()): [] for decayed in (True, False)}
    for name, parameter in named:
        kind = (decays(name, parameter), isinstance(parameter, DTensor), (paces or {}).get(name, LrMultiplier()))
        groups.setdefault(kind, []).append((name, parameter))
    return torch.optim.AdamW(
        [
            {
                "params": [parameter for _, parameter in group],
                "names": [name for name, _ in group],
                "weight_decay": train.weight_decay if decayed else 0.0,
                "pace": pace,
            }
            for (decayed, _, pace), group in groups.items()
            if group
        ],
        lr=train.warmup_lr,
        betas=train.betas,
        eps=train.eps,
        fused=True,
    )
