"""The only place with collectives; on one process each is the identity."""

import torch
import torch.distributed as dist
from torch import Tensor

from declip.supervision.objective import Gather, alone


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order; the gradient of a row is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        """(B, k) → (W·B, k)."""
        gathered = rows.new_empty(dist.get_world_size() * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(gathered, rows.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> Tensor:
        """(W·B, k) → (B, k): sum over ranks, then this rank's rows."""
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """All ranks' rows (N, k), with gradient; every rank must hold the same number of rows."""
    return _GatherRows.apply(rows)


def gather() -> Gather:
    """The gather that fits: the identity on one process, `gather_rows` on several."""
    return gather_rows if world_size() > 1 else alone


def rank() -> int:
    """This process's number, 0 on one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1
