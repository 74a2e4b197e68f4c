"""AdamW and which parameters it decays."""

from collections.abc import Iterable

import torch
from torch import nn

from declip.config import Train

UNDECAYED = ("positional_embedding", "pos_embed", "cls_token", "class_embedding", "reg_token")


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to biases, norms, scales, or embeddings of positions."""
    return parameter.ndim >= 2 and not name.endswith(UNDECAYED)


def named_trainable(*modules: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """All parameters that learn, named by module number and path, in a fixed order."""
    return [
        (f"{index}.{name}", parameter)
        for index, module in enumerate(modules)
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    ]


def build_optimizer(named: Iterable[tuple[str, nn.Parameter]], train: Train) -> torch.optim.AdamW:
    """AdamW with two groups, with and without decay (Loshchilov and Hutter 2019)."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in named:
        groups[decays(name, parameter)].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": train.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=train.lr_start,
        betas=train.betas,
        eps=train.eps,
        fused=True,
    )
