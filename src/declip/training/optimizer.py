"""AdamW and which parameters it decays."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from declip.config import Train

UNDECAYED = (
    *("positional_embedding", "position_embeddings.weight", "pos_embed"),
    *("cls_token", "class_embedding", "reg_token"),
)


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
    """AdamW with two groups, with and without decay (Loshchilov and Hutter 2019), each parted where some are shards."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(True, False): [], (False, False): []}
    for name, parameter in named:
        groups.setdefault((decays(name, parameter), isinstance(parameter, DTensor)), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": train.weight_decay if decayed else 0.0}
            for (decayed, _), group in groups.items()
        ],
        lr=train.lr_start,
        betas=train.betas,
        eps=train.eps,
        fused=True,
    )
