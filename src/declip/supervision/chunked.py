"""Cross-entropy over many keys: logits are computed in blocks of rows, twice, instead of being kept."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_BYTES = 2**26
"""Logits held at a time: 64 MiB."""


def exceeds(max_logit_bytes: float | None, rows: Tensor, columns: int) -> bool:
    """Whether the logits of `rows` against `columns` keys take more than `max_logit_bytes`; None: never."""
    return max_logit_bytes is not None and len(rows) * columns * rows.itemsize > max_logit_bytes


def cross_entropy(rows: Tensor, keys: Tensor, offset: int = 0, excluded: int | None = None) -> Tensor:
    """Cross-entropy of rows @ keys.T, without ever holding the (B, N) matrix.

    Equals the plain loop
        mean over b of  log Σₙ exp(rows[b]·keys[n]) - rows[b]·keys[offset + b],  n ≠ excluded + b

    Forward keeps only the log of the sum of each row; backward computes the logits again. That is 8·B·N·d operations
    instead of 6·B·N·d; keys without gradient save 2·B·N·d. Differentiable once.

    Args:
        rows: (B, d) float32 or float64, already times the scale of the logits.
        keys: (N, d) of the same type; N >= offset + B.
        offset: Row of `keys` that belongs to the first of `rows`.
        excluded: Row of `keys` that the first of `rows` is not compared with, and so on; None: all are compared.
    """
    return _CrossEntropy.apply(rows, keys, offset, excluded)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, keys: Tensor, offset: int, excluded: int | None) -> Tensor:
        sums, own = rows.new_empty(len(rows)), rows.new_empty(len(rows))
        for start, stop, logits in _blocks(rows, keys, excluded):
            own[start:stop] = logits.diagonal(offset + start)
            largest = logits.amax(dim=1)
            sums[start:stop] = logits.sub_(largest[:, None]).exp_().sum(dim=1).log_().add_(largest)
        ctx.save_for_backward(rows, keys, sums)
        ctx.offset, ctx.excluded = offset, excluded
        return (sums - own).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, keys, sums = ctx.saved_tensors
        of_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        of_keys = torch.zeros_like(keys) if ctx.needs_input_grad[1] else None
        for start, stop, logits in _blocks(rows, keys, ctx.excluded):
            probabilities = logits.sub_(sums[start:stop, None]).exp_()
            probabilities.diagonal(ctx.offset + start).sub_(1)
            if of_rows is not None:
                torch.mm(probabilities, keys, out=of_rows[start:stop])
            if of_keys is not None:
                of_keys.addmm_(probabilities.mT, rows[start:stop])
        factor = gradient / len(rows)
        return *(None if some is None else some.mul_(factor) for some in (of_rows, of_keys)), None, None


def _blocks(rows: Tensor, keys: Tensor, excluded: int | None) -> Iterator[tuple[int, int, Tensor]]:
    """Compute logits block by block, all in the same memory: start, stop, (stop - start, N).

    Autocast does not touch products that are written into given memory.
    """
    size = max(1, BLOCK_BYTES // (len(keys) * keys.itemsize))
    memory = rows.new_empty(min(size, len(rows)), len(keys))
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        logits = torch.mm(rows[start:stop], keys.mT, out=memory[: stop - start])
        if excluded is not None:
            logits.diagonal(excluded + start).fill_(-torch.inf)
        yield start, stop, logits
