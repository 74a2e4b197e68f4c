"""Batch norm over all ranks' pairs, so that distributed training equals training on one process."""

import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from declip.models.freezing import is_frozen
from declip.training import distributed


def synchronize(module: nn.Module, device: torch.device) -> None:
    """Synchronize every batch norm inside a module over all ranks, in place; names and values stay.

    On CUDA torch's `SyncBatchNorm` is used; torch has none for a CPU, there it is `HostSyncBatchNorm`. Frozen ones are
    left alone: they use no statistics of a batch.
    """
    for name, child in list(module.named_children()):
        if not isinstance(child, _BatchNorm):
            synchronize(child, device)
        elif is_frozen(child):
            continue
        elif device.type == "cuda":
            setattr(module, name, convert_sync_batchnorm(child))
        else:
            child.__class__ = _HostSyncBatchNormAct if isinstance(child, BatchNormAct2d) else HostSyncBatchNorm


class HostSyncBatchNorm(_BatchNorm):
    """Batch norm over all ranks on any device; ranks may hold different numbers of pairs, but each at least one."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) → the same shape."""
        return _normalize(self, x)


class _HostSyncBatchNormAct(BatchNormAct2d):
    """timm's batch norm with dropout and activation behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(_normalize(self, x)))


def _normalize(norm: _BatchNorm, x: Tensor) -> Tensor:
    """Normalize by two sums over ranks: of the values, then of the squared deviations from their mean."""
    if not norm.training or distributed.world_size() == 1:
        return F.batch_norm(
            x,
            norm.running_mean,
            norm.running_var,
            norm.weight,
            norm.bias,
            norm.training,
            norm.momentum or 0.0,
            norm.eps,
        )
    values = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    others = [0, *range(2, x.ndim)]
    own = torch.cat([values.sum(others), values.new_tensor([values.numel() / x.shape[1]])])
    total = distributed.summed(own)
    count = total[-1].detach()
    mean = total[:-1] / count
    shape = [1, -1] + [1] * (x.ndim - 2)
    centered = values - mean.view(shape)
    variance = distributed.summed(centered.square().sum(others)) / count
    _update_statistics(norm, mean.detach(), variance.detach() * count / (count - 1))
    normed = centered * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        normed = normed * norm.weight.view(shape) + norm.bias.view(shape)
    return normed.to(x.dtype)


@torch.no_grad()
def _update_statistics(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Update the running statistics as torch does."""
    if not norm.track_running_stats:
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None, "no tower or head keeps a cumulative average"
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
    norm.running_var.lerp_(variance.to(norm.running_var), norm.momentum)
