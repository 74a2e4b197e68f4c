"""Distribution, applied to a learner from outside: DDP, FSDP2, SyncBatchNorm, and gradients over ranks."""

from collections.abc import Iterable
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from declip.errors import UserError
from declip.models.blocks import blocks_of, grad_checkpointing
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training import distributed
from declip.training.batch_norm import synchronize
from declip.training.learner import Learner

BUFFERS = ("forward_sync_buffers", "broadcast_buffers")
"""DDP's option for sending the first rank's buffers around at every step: its name since torch 2.13, and before."""

BUCKET = 1 << 23
"""Numbers that are averaged in one message, 32 MB of float32."""

CONTRASTS = {"contrastive", "multi_view"}
"""Terms through which every parameter of the towers, and the logit scale, gets a gradient."""


def build_learner(recipe: Recipe, model: DualEncoder, objective: Objective) -> nn.Module:
    """Prepare model and objective, in place, for this process's part of the work.

    Args:
        recipe: ``train.strategy``, ``train.sync_batch_norm`` and ``train.grad_checkpointing`` are read.
        model, objective: On this rank's device; they keep their parameter names.

    Returns:
        A module with `Learner`'s forward pass. Under DDP a backward pass through it averages gradients over the ranks.

    Raises:
        UserError: FSDP with averaged weights or chunks, or chunks for a tower with batch norm.
    """
    train = recipe.train
    learner = Learner(model, objective)
    if train.grad_cache_chunk is not None:
        _check_chunks(recipe, model)
    if distributed.world_size() > 1 and train.sync_batch_norm:
        synchronize(learner if train.grad_cache_chunk is None else objective, model.device)
    if train.grad_checkpointing:
        for tower in (model.image_tower, model.text_tower):
            grad_checkpointing(tower)
    if distributed.world_size() == 1 or train.grad_cache_chunk is not None:
        return learner
    if train.strategy == "fsdp":
        if train.ema_decay is not None:
            raise UserError("train.strategy=fsdp cannot keep averaged weights. Leave train.ema_decay out, or use ddp.")
        _shard(model, objective)
        learner.sharded = True
        return learner
    newer = BUFFERS[0] in signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {BUFFERS[0] if newer else BUFFERS[1]: False}
    return DistributedDataParallel(
        learner,
        **options,  # the queue and synchronized batch norms are equal on all ranks by construction
        gradient_as_bucket_view=True,
        find_unused_parameters=not CONTRASTS & set(objective.weights),
    )


def _check_chunks(recipe: Recipe, model: DualEncoder) -> None:
    train = recipe.train
    if train.strategy == "fsdp" and distributed.world_size() > 1:
        raise UserError(
            "train.grad_cache_chunk goes with train.strategy=ddp only. With fsdp, train.grad_checkpointing saves "
            "memory."
        )
    if model.image_tower.has_batch_norm and not train.allow_batchnorm_chunking:
        raise UserError(
            f"train.grad_cache_chunk={train.grad_cache_chunk}, but the image tower '{recipe.image.model}' has batch "
            "norm, which would see each chunk alone instead of the whole batch: other numbers. Take a tower with layer "
            "norm, or allow it with train.allow_batchnorm_chunking=true."
        )


def _shard(model: DualEncoder, objective: Objective) -> None:
    """Shard towers and heads block by block; what is left, the scales, stays whole on every rank."""
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    shard = partial(fully_shard, mesh=mesh)
    for tower in (model.image_tower, model.text_tower):
        for block in blocks_of(tower):
            shard(block)
        shard(tower)
    for term in objective.terms.values():
        for head in term.children():
            if any(True for _ in head.parameters()):
                shard(head)


def core(learner: nn.Module) -> Learner:
    """The learner without DDP around it."""
    inner = learner.module if isinstance(learner, DistributedDataParallel) else learner
    assert isinstance(inner, Learner)
    return inner


def clip_gradients(parameters: list[Tensor], limit: float) -> Tensor:
    """Scale the whole gradient to at most a norm.

    Args:
        parameters: Sharded ones and whole ones may be mixed.
        limit: The largest norm; infinity leaves the gradient.

    Returns:
        The norm before, a scalar.
    """
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, limit)
    groups = (sharded, [p for p in parameters if not isinstance(p, DTensor)])
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    norm = torch.stack([whole(nn.utils.get_total_norm(each)) for each in gradients if each]).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def average_unsharded(parameters: Iterable[Tensor]) -> None:
    """Average the gradients of the parameters that FSDP left whole; nothing is left to do under DDP."""
    for parameter in parameters:
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            distributed.average(parameter.grad)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over the ranks, some at a time; every rank must have one for the same parameters."""
    if distributed.world_size() == 1:
        return
    waiting: list[Tensor] = []
    for gradient in [p.grad for p in parameters if p.grad is not None]:
        waiting.append(gradient)
        if sum(each.numel() for each in waiting) >= BUCKET:
            _average_together(waiting)
            waiting = []
    if waiting:
        _average_together(waiting)


def _average_together(gradients: list[Tensor]) -> None:
    flat = distributed.average(torch.cat([gradient.flatten() for gradient in gradients]))
    for gradient, mean in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def whole(tensor: Tensor) -> Tensor:
    """A tensor with all its shards; every rank must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def load_full_state(into: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put whole tensors into a module whose parameters may be sharded; names must be all and the same."""
    own = into.state_dict(keep_vars=True)
    into.load_state_dict(
        {name: shard_like(own[name], tensor) for name, tensor in tensors.items() if name in own}
        | {name: tensor for name, tensor in tensors.items() if name not in own}
    )


def shard_like(like: object, tensor: Tensor) -> Tensor:
    """A whole tensor cut as another one is, and laid out in memory as that: fused kernels walk both side by side."""
    if not isinstance(like, Tensor) or tensor.shape != like.shape:
        return tensor
    if not isinstance(like, DTensor):
        return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
