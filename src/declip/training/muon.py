"""Muon: momentum whose update is orthogonalized, for the weights of linear and convolution layers.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon); the factor on the learning rate is Liu et al.'s (arXiv
2502.16982), by which AdamW's learning rate and weight decay can be kept.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from declip.training.parallel import full_tensor, shard_like

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2
"""The usual root mean square of AdamW's updates."""

KEPT_BY_ADAMW = (
    *("embedding", "embeddings", "pos_embed", "cls_token", "reg_token"),
    *("masked_language", "word_classification"),  # heads over a vocabulary
)


def uses_muon(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is a matrix or convolution between features, neither an embedding nor over a vocabulary."""
    if parameter.ndim < 2 or any(word in name for word in KEPT_BY_ADAMW):
        return False
    return min(parameter.shape[0], parameter[0].numel()) > 1


def orthogonalize(matrices: Tensor) -> Tensor:
    """Bring the singular values of matrices near 1 by five Newton-Schulz iterations.

    Args:
        matrices: (n, rows, columns).
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None]
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """AdamW whose groups with ``"muon": True`` take Muon's steps.

    Weights of one shape are orthogonalized together, in bfloat16 on CUDA: torch.optim.Muon and timm's take one weight
    at a time, in bfloat16 everywhere, which is several times slower on a CPU. Sharded weights are gathered for it.
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
        by_shape: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is not None:
                by_shape[parameter.shape[0], parameter.numel() // parameter.shape[0]].append(parameter)
        for (rows, columns), parameters in by_shape.items():
            updates = []
            for parameter in parameters:
                gradient, state = parameter.grad, self.state[parameter]
                assert gradient is not None
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                    state["step"] = torch.zeros(())  # AdamW's load_state_dict looks for it
                momentum = state["momentum"].mul_(MOMENTUM).add_(gradient)
                updates.append(full_tensor(gradient.add(momentum, alpha=MOMENTUM)).flatten(1))
            stacked = torch.stack(updates)
            steps = orthogonalize(stacked.bfloat16() if stacked.is_cuda else stacked)
            rate = -RMS * max(rows, columns) ** 0.5 * group["lr"]
            for parameter, step in zip(parameters, steps.to(stacked.dtype), strict=True):
                step = step.reshape(parameter.shape)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(shard_like(parameter, step) if isinstance(parameter, DTensor) else step, alpha=rate)
