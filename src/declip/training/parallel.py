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
"""DDP's option to broadcast rank 0's buffers at every step: its name since torch 2.13, and before."""

BUCKET = 1 << 23
"""Numbers that are averaged in one message, 32 MB of float32."""

CONTRASTIVE = {"contrastive", "multi_view"}
"""Losses through which every parameter of the towers, and the logit scale, gets a gradient."""


def build_learner(recipe: Recipe, model: DualEncoder, objective: Objective) -> nn.Module:
    """Build the learner and distribute it over the ranks as the recipe's ``train`` section says.

    Args:
        model, objective: On this rank's device; changed in place, with the same parameter names.

    Returns:
        A `Learner`, or DDP around it.

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
    buffers = next(name for name in BUFFERS if name in signature(DistributedDataParallel).parameters)
    option: Any = {buffers: False}  # the queue and synchronized batch norms are equal on all ranks by construction
    return DistributedDataParallel(
        learner,
        **option,
        gradient_as_bucket_view=True,
        find_unused_parameters=not CONTRASTIVE & set(objective.weights),
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
            "norm, whose statistics would be those of a chunk. Take a tower with layer norm, or allow it with "
            "train.allow_batchnorm_chunking=true."
        )


def _shard(model: DualEncoder, objective: Objective) -> None:
    """Shard towers and heads block by block; the scales stay whole on every rank."""
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


def unwrap(learner: nn.Module) -> Learner:
    """Give the learner without DDP around it."""
    inner = learner.module if isinstance(learner, DistributedDataParallel) else learner
    assert isinstance(inner, Learner)
    return inner


def clip_gradients(parameters: list[Tensor], limit: float) -> Tensor:
    """Scale the whole gradient to a norm of at most `limit`; give the norm before, a scalar.

    Sharded and other parameters may be mixed.
    """
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, limit)
    groups = (sharded, [p for p in parameters if not isinstance(p, DTensor)])
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    norm = torch.stack([full_tensor(nn.utils.get_total_norm(some)) for some in gradients if some]).norm()
    for group in groups:
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def average_unsharded(parameters: Iterable[Tensor]) -> None:
    """Average the gradients of the parameters that FSDP does not shard."""
    for parameter in parameters:
        if not isinstance(parameter, DTensor) and parameter.grad is not None:
            distributed.average(parameter.grad)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over the ranks in buckets; every rank must have them for the same parameters."""
    if distributed.world_size() == 1:
        return
    buckets: list[list[Tensor]] = [[]]
    for gradient in [p.grad for p in parameters if p.grad is not None]:
        if sum(some.numel() for some in buckets[-1]) >= BUCKET:
            buckets.append([])
        buckets[-1].append(gradient)
    for bucket in filter(None, buckets):
        flat = distributed.average(torch.cat([gradient.flatten() for gradient in bucket]))
        for gradient, mean in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor's shards; a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def load_full_state(into: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state dict of whole tensors into a module whose parameters may be sharded."""
    own = into.state_dict(keep_vars=True)
    into.load_state_dict({name: shard_like(own.get(name), tensor) for name, tensor in tensors.items()})


def shard_like(like: object, tensor: Tensor) -> Tensor:
    """Give a whole tensor the sharding and memory layout of another one, which fused kernels rely on."""
    if not isinstance(like, Tensor) or tensor.shape != like.shape:
        return tensor
    if not isinstance(like, DTensor):
        return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
