"""InfoNCE of one process from one matrix of logits: half the work where the heads are small."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _BothWays(torch.autograd.Function):
    """Cross-entropy along rows and columns of image @ text.T; three matrix products, where autograd takes six."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor) -> Tensor:
        logits = image @ text.mT
        rows, columns = logits.logsumexp(dim=1, keepdim=True), logits.logsumexp(dim=0, keepdim=True)
        ctx.save_for_backward(image, text, logits, rows, columns)
        return ((rows.mean() + columns.mean()) / 2 - logits.diagonal().mean()).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        image, text, logits, rows, columns = ctx.saved_tensors
        weights = (logits - rows).exp_()
        weights += (logits - columns).exp_()
        weights.diagonal().sub_(2)
        weights *= gradient / (2 * len(logits))
        return weights @ text, weights.mT @ image


def shared_info_nce(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    """Symmetric InfoNCE of a whole batch; `contrastive.info_nce(image, text, image, text, scale)` up to rounding.

    Args:
        image: (B, d) image features, L2-normalized, float32 or float64.
        text: (B, d) text features of the same pairs, L2-normalized.
        scale: exp(logit_scale).

    Returns:
        The loss, a scalar. One (B, B) matrix is kept for the backward pass.
    """
    with torch.autocast(image.device.type, enabled=False):
        return _BothWays.apply(scale * image, text)
