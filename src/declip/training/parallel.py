"""The learner, compiled or not, and its distribution: DDP, FSDP2, batch norm over ranks, and gradients over ranks."""

from collections.abc import Iterable
from dataclasses import replace
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from declip.data.batch import PairBatch
from declip.data.images import fused_views, views
from declip.data.images.views import Finish
from declip.errors import UserError
from declip.interchange.weights import Weights
from declip.models.device import compiles
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import BatchNorm
from declip.models.layers import blocks_of, grad_checkpointing, is_frozen
from declip.recipe.schema import Train
from declip.runs.checkpoint import without_prefix
from declip.runs.folder import log
from declip.supervision.contrastive import to_float32
from declip.supervision.objective import Gather, Objective
from declip.training import distributed


class Learner(nn.Module):
    """The two towers and the objective, as one module: what trains and what a checkpoint saves."""

    def __init__(self, model: DualEncoder, objective: Objective) -> None:
        super().__init__()
        # FSDP shards towers and heads
        self.model = model
        self.objective = objective
        self.sharded = False
        self.finish_views: Finish = views.apply  # or a faster one
        image = objective.recipe.image
        self.mean = torch.tensor(image.mean, device=model.device)
        self.std = torch.tensor(image.std, device=model.device)

    def forward(self, batch: PairBatch, gather: Gather | None, offset: int) -> dict[str, Tensor]:
        """Compute the losses by name, and "loss", their weighted sum; see `Objective.forward`."""
        return self.objective(self.model, batch, gather, offset)

    def prepare(self, batch: PairBatch) -> PairBatch:
        """Move a batch to the device and finish its images there."""
        batch = batch.to(self.mean.device, non_blocking=True)
        finished = views.apply_photometric(batch.views, self.mean, self.std, self.finish_views)
        return replace(batch, views=finished)

    def autocast(self) -> torch.autocast:
        """The context in which towers and heads run; losses and logits stay float32."""
        enabled = self.objective.recipe.train.precision == "bf16"
        return torch.autocast(self.mean.device.type, torch.bfloat16, enabled=enabled)


def build_learner(model: DualEncoder, objective: Objective) -> nn.Module:
    """Build a `Learner`, or DDP around it, distributed as the recipe says; model and objective are changed in place."""
    train = objective.recipe.train
    learner = Learner(model, objective)
    _check(train, model)
    chunk = grad_cache_chunk(train)
    if train.channels_last and (train.strategy == "ddp" or distributed.world_size() == 1):
        model.image_tower.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    # FSDP takes contiguous weights only; convolutions follow the images' format as well
    elif train.channels_last:
        model.image_tower.register_forward_pre_hook(
            lambda _, x: x[0].contiguous(memory_format=torch.channels_last)
        )
    if distributed.world_size() > 1:
        synchronize(learner if chunk is None else objective)
    if train.grad_checkpointing:
        grad_checkpointing(model.image_tower)
        grad_checkpointing(model.text_tower)
    if train.compile and compiles(model.device):
        compile_blocks(model)
        learner.finish_views = fused_views.compiled()
    if distributed.world_size() == 1 or chunk is not None:
        return learner
    if train.strategy == "fsdp":
        _shard(model, objective)
        learner.sharded = True
        return learner
    known = signature(DistributedDataParallel).parameters
    buffers = "broadcast_buffers"  # before torch 2.13
    if "forward_sync_buffers" in known:
        buffers = "forward_sync_buffers"
    # The queue and synchronized batch norms are equal on all ranks by construction.
    options: Any = {buffers: False, "find_unused_parameters": not objective.reaches_all}
    return DistributedDataParallel(learner, gradient_as_bucket_view=True, **options)


def compile_blocks(model: DualEncoder, backend: str = "inductor") -> int:
    """Compile the blocks of both towers; return the number of blocks.

    Blocks of one kind share graphs: one for the first sizes, one for any number of rows, one for any length of texts.
    Blocks with a batch norm that is synchronized over processes run as they are. Parameters keep their names. A block
    that cannot be compiled is an error: a slow run in its place would go unnoticed.
    """
    count = 0
    for block in [*blocks_of(model.image_tower), *blocks_of(model.text_tower)]:
        if any(isinstance(part, SharedBatchNorm) for part in block.modules()):
            continue
        # Not `block.compile`: it compiles nothing of a block whose activations are recomputed.
        vars(block)["forward"] = torch.compile(block.forward, backend=backend)
        count += 1
    return count


def grad_cache_chunk(train: Train) -> int | None:
    """Number of pairs in a GradCache chunk; None where no process holds more pairs, so that one pass is exact."""
    chunk = train.grad_cache_chunk
    pairs = -(-train.batch_size // distributed.world_size())
    if chunk is None or pairs <= chunk:
        return None
    return chunk


def _check(train: Train, model: DualEncoder) -> None:
    ranks = distributed.world_size()
    chunk = grad_cache_chunk(train)
    if train.batch_size < ranks:
        raise UserError(
            f"train.batch_size={train.batch_size} is less than the {ranks} processes. Increase it."
        )
    if train.strategy == "fsdp" and chunk and ranks > 1:
        raise UserError(
            "train.grad_cache_chunk requires train.strategy=ddp. Change one of the two."
        )
    if chunk and model.image_tower.has_batch_norm and distributed.is_rank_zero():
        log.warning(
            f"train.grad_cache_chunk={chunk}: the batch norm of '{model.recipe.image.model}' sees each "
            "chunk alone, so gradients are not exactly those of the whole batch; layer norm has no such difference."
        )


def _shard(model: DualEncoder, objective: Objective) -> None:
    """Shard towers and heads block by block; the scales are replicated."""
    image = model.image_tower
    text = model.text_tower
    parts = [*blocks_of(image), *blocks_of(text), image, text]
    for term in objective.terms.values():
        for head in term.children():
            # A model that does not learn, such as a teacher, stays whole
            if any(p.requires_grad for p in head.parameters()):
                parts.append(head)
    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    for part in parts:
        fully_shard(part, mesh=mesh)


def unwrap(learner: nn.Module) -> Learner:
    """Return the learner without DDP around it."""
    if isinstance(learner, DistributedDataParallel):
        learner = learner.module
    assert isinstance(learner, Learner)
    return learner


def whole_model(learner: nn.Module) -> DualEncoder:
    """Return the learner's model; with FSDP a copy with all weights, of which each rank encodes what it likes.

    A collective: forward passes of the model itself are collectives too, of which all ranks take equally many.
    """
    inner = unwrap(learner)
    if not inner.sharded:
        return inner.model
    tensors = {name: full_tensor(tensor).cpu() for name, tensor in inner.state_dict().items()}
    weights = without_prefix("model", tensors)
    heads = without_prefix("objective", tensors)
    recipe = inner.objective.recipe
    model = Weights(recipe, weights, recipe.name, heads).build()
    return model.to(inner.model.device)


def clip_gradients(parameters: list[Tensor], limit: float) -> Tensor:
    """Scale all gradients to a total norm of at most `limit`; return the norm before, a scalar."""
    sharded = [p for p in parameters if isinstance(p, DTensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, limit)
    # torch cannot mix sharded and other parameters
    others = [p for p in parameters if not isinstance(p, DTensor)]
    norms = []
    for group in (sharded, others):
        gradients = [p.grad for p in group if p.grad is not None]
        if gradients:
            norms.append(full_tensor(nn.utils.get_total_norm(gradients)))
    norm = torch.stack(norms).norm()
    for group in (sharded, others):
        nn.utils.clip_grads_with_norm_(group, limit, norm)
    return norm


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average gradients over the ranks, except those that FSDP shards; all ranks must have the same gradients.

    One collective for all: each has a latency, and a tower has hundreds of parameters. It costs a copy of them.
    """
    gradients = [p.grad for p in parameters if not isinstance(p, DTensor) and p.grad is not None]
    if distributed.world_size() == 1 or not gradients:
        return
    joined = torch.cat([gradient.flatten() for gradient in gradients])
    flat = distributed.average(joined)
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view(gradient.shape))


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a tensor's shards; a collective."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    return tensor


@torch.no_grad()
def load_full_state(into: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a state dict of full tensors into a module whose parameters may be sharded."""
    present = into.state_dict(keep_vars=True)
    into.load_state_dict(
        {name: shard_like(present.get(name), tensor) for name, tensor in tensors.items()}
    )


def shard_like(like: object, tensor: Tensor) -> Tensor:
    """Return a full tensor in the sharding and memory layout of another one, which fused kernels require."""
    if not isinstance(like, Tensor) or tensor.shape != like.shape:
        return tensor
    if isinstance(like, DTensor):
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def synchronize(module: nn.Module) -> None:
    """Replace every batch norm that learns by one that is synchronized over all ranks; names and values stay."""
    for name, child in list(module.named_children()):
        if not isinstance(child, BatchNorm):
            synchronize(child)
        elif not is_frozen(child):
            setattr(module, name, SharedBatchNorm(child))


class SharedBatchNorm(nn.BatchNorm1d):
    """Batch norm over all ranks, with the parameters and statistics of another; each rank has a pair.

    torch's `SyncBatchNorm` works on CUDA alone, and there it waits for the device three times a layer, since it looks
    for ranks without a row. This one never waits.
    """

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        for name, value in (*norm.named_parameters(), *norm.named_buffers()):
            if "." not in name:
                setattr(self, name, value)
        # timm's batch norms end with dropout and activation.
        self.drop = getattr(norm, "drop", nn.Identity())
        self.act = getattr(norm, "act", nn.Identity())
        self.train(norm.training)

    def forward(self: Any, x: Tensor) -> Tensor:
        """(B, C, ...) → the same shape."""
        if self.training:
            normed, mean, variance, count = _Normalized.apply(x, self.weight, self.bias, self.eps)
            if self.track_running_stats:
                self._track(mean, variance, count)
        else:
            normed = F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return self.act(self.drop(normed))

    @torch.no_grad()
    def _track(self: Any, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        """Update the running statistics as torch does."""
        unbiased = variance * count / (count - 1)
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_(unbiased.to(self.running_var), self.momentum)


class _Normalized(torch.autograd.Function):
    """Values normalized by the statistics of all ranks: one collective forward, one backward.

    The statistics of two parts are joined by the sum of squared deviations from each part's own mean (Chan et al.
    1979), which loses no digits where the mean is large.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = to_float32(x)
        axes, shape = _axes(x)
        # --- own statistics, then those of all ranks
        rows = values.numel() // x.shape[1]
        variance, mean = torch.var_mean(values, axes, correction=0)  # (C,)
        # A constant, so without a copy
        count_of_rank = values.new_full((1,), rows)
        own = torch.cat([mean, variance * rows, count_of_rank])
        ranks = distributed.from_ranks(own)  # (W, 2 · C + 1)
        means, squares, counts = ranks.split([len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(dim=0) / count
        squares = squares + counts * (means - mean).square()
        variance = squares.sum(dim=0) / count
        # --- normalize
        inverse = (variance + eps).rsqrt()
        scale = inverse
        if weight is not None:
            scale = inverse * to_float32(weight)
        normed = (values - mean.view(shape)).mul_(scale.view(shape))
        if bias is not None:
            normed.add_(to_float32(bias).view(shape))
        ctx.save_for_backward(x, mean, inverse, scale, count)
        ctx.affine = weight is not None
        ctx.mark_non_differentiable(mean, variance, count)
        return normed.to(x.dtype), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, mean, inverse, scale, count = ctx.saved_tensors
        axes, shape = _axes(x)
        gradient = to_float32(gradients[0])
        unit = (to_float32(x) - mean.view(shape)).mul_(inverse.view(shape))
        # --- sums of this rank, which are the gradients of bias and weight, then of all ranks
        of_bias = gradient.sum(axes)
        of_weight = (gradient * unit).sum(axes)
        means = distributed.sum_over_ranks(torch.cat([of_bias, of_weight])) / count
        mean_gradient, mean_product = means.view(2, -1)
        # --- of the values
        centered = gradient - mean_gradient.view(shape)
        of_values = (centered - unit * mean_product.view(shape)).mul_(scale.view(shape))
        of_values = of_values.to(x.dtype)
        if not ctx.affine:
            return of_values, None, None, None
        return of_values, of_weight, of_bias, None


def _axes(x: Tensor) -> tuple[list[int], list[int]]:
    """The axes of (B, C, ...) that a channel's statistics are of, and the shape of these for all channels."""
    axes = [0, *range(2, x.ndim)]
    shape = [1, -1] + [1] * (x.ndim - 2)
    return axes, shape
