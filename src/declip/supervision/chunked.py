"""Losses over many keys: above a limit, logits are computed in blocks of rows, twice, instead of being kept."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_BYTES = 2**26  # of logits held at a time: 64 MiB


def mean_in_blocks(
    loss: Callable[[int, int], Tensor], rows: int, row_bytes: int, max_logit_bytes: float | None
) -> Tensor:
    """Mean over rows of a loss that is a sum over rows.

    Args:
        loss: Sum over the rows from the first number to the second.
        row_bytes: Bytes of a row that the backward pass needs: its logits, or the positions of its maxima.
        max_logit_bytes: Bytes that may be kept for the backward pass; None: all.
    """
    if max_logit_bytes is None or rows * row_bytes <= max_logit_bytes:
        return loss(0, rows) / rows
    # Blocks are computed in both passes: 8·B·N·d operations instead of 6·B·N·d.
    size = max(1, BLOCK_BYTES // row_bytes)
    blocks = [(start, min(start + size, rows)) for start in range(0, rows, size)]
    sums = [checkpoint(loss, *block, use_reentrant=False, preserve_rng_state=False) for block in blocks]
    return torch.stack(sums).sum() / rows
