"""AdamW, SGD, and Muon, whose update of a matrix is its orthogonalized momentum.

Muon: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the factor on the learning rate is Liu et al.'s (arXiv
2502.16982), which allows AdamW's learning rate and weight decay.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from declip.errors import UserError
from declip.models.device import computes_bf16
from declip.recipe.schema import Train
from declip.training.parallel import full_tensor, shard_like

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2  # the usual root mean square of AdamW's updates
LARGE = 128  # smaller dimension from which bfloat16 is faster; below, converting costs a CPU more than it saves
ADAMW_NAMES = ("embedding", "pos_embed", "cls_token", "reg_token", "bias")


def use_muon(name: str, parameter: Tensor, over_vocabulary: tuple[str, ...] = ()) -> bool:
    """Whether Muon updates a parameter: matrices and convolutions between features, not embeddings or vocabularies."""
    if (
        parameter.ndim < 2
        or name.startswith(over_vocabulary)
        or any(word in name for word in ADAMW_NAMES)
    ):
        return False
    return min(parameter.shape[0], parameter[0].numel()) > 1


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (n, rows, columns) near 1 by five Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices
    if tall:
        x = x.mT
    norms = x.flatten(1).norm(dim=1).clamp_min(1e-7)
    x = x / norms[:, None, None]
    if x.shape[2] < 2 * x.shape[1] or x.dtype == torch.bfloat16:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, p, x, beta=a)
    else:
        # x ← p(x xᵀ) x turns x xᵀ into p (x xᵀ) p, so the small squares can be iterated alone: for wide matrices less
        # than half the work. They hold the singular values squared, too small for bfloat16.
        gram, product = x @ x.mT, None
        for _ in range(ITERATIONS):
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            p.diagonal(dim1=1, dim2=2).add_(a)
            gram = p @ gram @ p
            product = p if product is None else p @ product
        x = product @ x
    if tall:
        x = x.mT
    return x


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``"muon": True`` take Muon's steps.

    Weights of one shape are orthogonalized together, large float32 ones in bfloat16 where the device computes in it.
    torch.optim.Muon and timm's take one weight at a time, in bfloat16 everywhere, which is several times slower on a
    CPU. Sharded weights are gathered for it.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step."""
        groups = self.param_groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            return super().step(closure)
        finally:
            self.param_groups = groups

    def _muon_step(self, group: dict[str, Any]) -> None:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
                state["step"] = torch.zeros(())  # AdamW's load_state_dict looks for it
            momentum = state["momentum"]
            momentum.mul_(MOMENTUM).add_(parameter.grad)
            update = parameter.grad.add(momentum, alpha=MOMENTUM)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            matrix = full_tensor(update).flatten(1)
            by_shape[matrix.shape].append((parameter, matrix))
        for shape, pairs in by_shape.items():
            stacked = torch.stack([matrix for _, matrix in pairs])
            large = stacked.dtype == torch.float32 and min(shape) >= LARGE
            half = large and computes_bf16(stacked.device)
            matrices = stacked
            if half:
                matrices = stacked.bfloat16()
            steps = orthogonalize(matrices).to(stacked.dtype)
            rate = -RMS * max(shape) ** 0.5 * group["lr"]
            for (parameter, _), step in zip(pairs, steps, strict=True):
                step = step.reshape(parameter.shape)
                if isinstance(parameter, DTensor):
                    step = shard_like(parameter, step)
                parameter.add_(step, alpha=rate)


OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
"""Parameter groups, each with its "weight_decay" → optimizer; the run sets "lr" in each before every step."""


class LrMultiplier(NamedTuple):
    """A parameter's learning rate relative to the recipe's, and whether it is 0 while new heads warm up."""

    factor: float = 1.0
    frozen_in_warmup: bool = False


UNDECAYED = (
    "positional_embedding",
    "position_embedding.weight",
    "position_embeddings.weight",
    "pos_embed",
    "cls_token",
    "class_embedding",
    "reg_token",
    "relative_position_bias_table",
    "attention_biases",
)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether weight decay applies: not to biases, norms, scales, or position and class embeddings."""
    # Also of shape (C, 1, 1), as layer scales and temperatures of some towers are, single numbers do not form a matrix.
    return sum(size > 1 for size in parameter.shape) >= 2 and not name.endswith(UNDECAYED)


def named_trainable(model: nn.Module, objective: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List all trainable parameters, named "model.…" and "objective.…", in a fixed order."""
    both = nn.ModuleDict({"model": model, "objective": objective})
    return [
        (name, parameter) for name, parameter in both.named_parameters() if parameter.requires_grad
    ]


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    train: Train,
    multipliers: Mapping[str, LrMultiplier] | None = None,
    over_vocabulary: tuple[str, ...] = (),
    make: OptimizerFactory | None = None,
) -> torch.optim.Optimizer:
    """Build the recipe's optimizer, or `make`'s, with groups by weight decay, learning rate and sharding."""
    multipliers = multipliers or {}
    usual = LrMultiplier()
    groups: dict[tuple[bool, bool, bool, LrMultiplier], dict[str, nn.Parameter]]
    groups = {(True, False, False, usual): {}, (False, False, False, usual): {}}
    for name, parameter in named:
        own = name.removeprefix("objective.")
        muon = train.optimizer == "muon" and use_muon(own, parameter, over_vocabulary)
        sharded = isinstance(parameter, DTensor)
        group = decays(name, parameter), muon, sharded, multipliers.get(name, usual)
        groups.setdefault(group, {})[name] = parameter
    options = list[dict[str, Any]]()
    for (decayed, muon, _, multiplier), members in groups.items():
        if members:
            option = {
                "params": list(members.values()),
                "names": list(members),  # by which checkpoints store the moments
                "weight_decay": train.weight_decay if decayed else 0.0,
                "multiplier": multiplier,  # see `group_lr`
                "muon": muon,
            }
            options.append(option)
    if make is not None:
        return _made(make, options)
    # As in DeCLIP's recipes for 88 million pairs; the fused one cannot be sharded
    if train.optimizer == "sgd":
        return torch.optim.SGD(options, lr=train.warmup_lr, momentum=0.9, nesterov=True)
    kind = Muon if train.optimizer == "muon" else torch.optim.AdamW
    # As in DeCLIP's YFCC15M recipe
    return kind(options, lr=train.warmup_lr, betas=(0.9, 0.98), fused=True)


def _made(make: OptimizerFactory, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Call a user's factory, and check that the run can drive and save what it returns."""
    names = [group["names"] for group in groups]
    optimizer = make(groups)
    is_optimizer = isinstance(optimizer, torch.optim.Optimizer)
    if not is_optimizer or [group.get("names") for group in optimizer.param_groups] != names:
        raise UserError(
            f"optimizer returned {type(optimizer).__name__}; return a torch.optim.Optimizer with the groups that it "
            "was given, such as lambda groups: torch.optim.NAdam(groups)."
        )
    return optimizer


def learning_rate(step: int, train: Train) -> float:
    """Compute the learning rate of a step, counted from 0: linear warm-up to `lr`, then a cosine.

    The first step has `warmup_lr`, step `warmup_steps` - 1 has `lr`, the last one 0, as in DeCLIP's YFCC15M recipe.
    """
    number = step + 1
    warmup = min(train.warmup_steps, train.steps)
    if number < warmup:
        risen = (train.lr - train.warmup_lr) * step / (warmup - 1)
        return train.warmup_lr + risen
    progress = (number - warmup) / max(train.steps - warmup, 1)
    cosine = math.cos(math.pi * min(progress, 1.0))
    return train.lr * (1 + cosine) / 2


def group_lr(
    lr: float, step: int, multiplier: LrMultiplier, head_warmup_steps: int, train: Train
) -> float:
    """Compute the learning rate of a parameter group at a step, counted from 0, from the recipe's `lr` at that step.

    A group that is frozen in the warm-up of the heads has 0 for `head_warmup_steps` steps, and then warms up linearly.
    """
    rate = lr * multiplier.factor
    if not multiplier.frozen_in_warmup:
        return rate
    warmed = (step - head_warmup_steps + 1) / max(train.warmup_steps, 1)
    return rate * max(0.0, min(1.0, warmed))


def moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state by parameter name; learning rates and decay come from the recipe."""
    tensors = dict[str, Tensor]()
    for name, parameter in _parameters(optimizer).items():
        for moment, tensor in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}.{moment}"] = tensor
    return tensors


def load_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Load the optimizer's state from full tensors, in the layout of their parameters."""
    parameters = _parameters(optimizer)
    numbers = {name: number for number, name in enumerate(parameters)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, moment = key.rsplit(".", 1)
        state.setdefault(numbers[name], {})[moment] = shard_like(parameters[name], tensor)
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )


def _parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """List the parameters by name in the order of the groups, by which torch counts them."""
    parameters = dict[str, Tensor]()
    for group in optimizer.param_groups:
        parameters |= zip(group["names"], group["params"], strict=True)
    return parameters
