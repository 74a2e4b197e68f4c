"""Muon: momentum whose update is orthogonalized, for the weights of linear and convolution layers.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the factor on the learning rate is Liu et al.'s (arXiv
2502.16982), which allows AdamW's learning rate and weight decay.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from declip.models.device import computes_bf16
from declip.training.parallel import full_tensor, shard_like

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2  # the usual root mean square of AdamW's updates
LARGE = 128  # smaller dimension from which bfloat16 is faster; below, converting costs a CPU more than it saves

ADAMW_NAMES = ("embedding", "pos_embed", "cls_token", "reg_token", "bias")


def use_muon(name: str, parameter: Tensor, over_vocabulary: tuple[str, ...] = ()) -> bool:
    """Whether Muon updates a parameter: matrices and convolutions between features, not embeddings or vocabularies."""
    if parameter.ndim < 2 or name.startswith(over_vocabulary) or any(word in name for word in ADAMW_NAMES):
        return False
    return min(parameter.shape[0], parameter[0].numel()) > 1


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices (n, rows, columns) near 1 by five Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    if x.shape[2] < 2 * x.shape[1] or x.dtype == torch.bfloat16:
        for _ in range(ITERATIONS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:
        # x ← p(x xᵀ) x turns x xᵀ into p (x xᵀ) p, so the small squares can be iterated alone: for wide matrices less
        # than half the work. They hold the singular values squared, too small for bfloat16.
        gram, product = x @ x.mT, None
        for _ in range(ITERATIONS):
            p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            p.diagonal(dim1=1, dim2=2).add_(a)
            gram, product = p @ gram @ p, p if product is None else p @ product
        x = product @ x
    return x.mT if tall else x


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
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                # AdamW's load_state_dict looks for "step".
                self.state[parameter] |= {"momentum": torch.zeros_like(parameter), "step": torch.zeros(())}
        gradients = [parameter.grad for parameter in parameters]
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_mul_(momenta, MOMENTUM)
        torch._foreach_add_(momenta, gradients)
        updates = torch._foreach_add(gradients, momenta, alpha=MOMENTUM)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter, update in zip(parameters, updates, strict=True):
            matrix = full_tensor(update).flatten(1)
            by_shape[matrix.shape[0], matrix.shape[1]].append((parameter, matrix))
        for shape, pairs in by_shape.items():
            stacked = torch.stack([matrix for _, matrix in pairs])
            half = stacked.dtype == torch.float32 and min(shape) >= LARGE and computes_bf16(stacked.device)
            steps = orthogonalize(stacked.bfloat16() if half else stacked)
            rate = -RMS * max(shape) ** 0.5 * group["lr"]
            for (parameter, _), step in zip(pairs, steps.to(stacked.dtype), strict=True):
                step = step.reshape(parameter.shape)
                parameter.add_(shard_like(parameter, step) if isinstance(parameter, DTensor) else step, alpha=rate)
