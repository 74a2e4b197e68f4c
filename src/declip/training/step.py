"""One step of training."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from declip.data.batch import PairBatch
from declip.data.images.crops import apply_photometric
from declip.training import distributed
from declip.training.distributed import StepSync
from declip.training.gradient_cache import backward_in_chunks
from declip.training.parallel import average_gradients, average_unsharded, clip_gradients, unwrap

Span = Callable[[str], AbstractContextManager[None]]
"""Gives a context in which the time of a named part of the step is taken."""


def untimed(name: str) -> AbstractContextManager[None]:
    """Take no time."""
    return nullcontext()


@dataclass
class StepParts:
    """The objects and settings of a step.

    Attributes:
        learner: From `declip.training.parallel.build_learner`.
        optimizer: With the learning rate of this step already set.
        mean, std: (3,) float32 on the device, statistics of the images.
        average: Called after the update, for averaged weights; None without.
        grad_clip_norm: Largest norm of the whole gradient; None leaves it.
        precision: "bf16" runs towers and heads in autocast; losses and logits stay float32.
        chunk: Pairs that the towers see at a time, see `declip.training.gradient_cache`; None for all.
        span: Times the parts of the step.
        skip_nonfinite: Undo the step when its loss or gradient is not finite; waits for the device.
    """

    learner: nn.Module
    optimizer: torch.optim.Optimizer
    mean: Tensor
    std: Tensor
    average: Callable[[nn.Module], None] | None = None
    grad_clip_norm: float | None = None
    precision: str = "fp32"
    chunk: int | None = None
    skip_nonfinite: bool = False
    span: Span = untimed


def training_step(parts: StepParts, batch: PairBatch, sync: StepSync | None = None) -> dict[str, Tensor]:
    """Move, augment, encode, gather, compute the losses, go backward, clip, update.

    Args:
        parts: See `StepParts`.
        batch: This rank's pairs as the loader gives them: views uint8 (B, 3, S, S), texts (T, B, L).
        sync: Number of pairs of each rank; None on one process.

    Returns:
        Detached scalars: the losses by name, "loss" and "grad_norm" (before clipping). The mean of the losses over the
        ranks is the whole batch's. Nothing waits for the device.
    """
    sync = sync or StepSync((len(batch),), stop=False)
    count = sync.rows[distributed.rank()]
    assert all(view.pixels.shape[:2] == (count, 3) for view in batch.views.values()), "(B, 3, S, S) each"
    assert batch.texts.shape[1] == count, "(T, B, L)"
    learner, optimizer, span = unwrap(parts.learner), parts.optimizer, parts.span
    device = learner.model.device
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=parts.precision == "bf16")
    prepare = partial(_prepare, parts, device)
    gather = distributed.gather(sync.rows)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # A forward pass changes the running statistics of batch norm.
    buffers = [(buffer, buffer.clone()) for buffer in learner.buffers()] if parts.skip_nonfinite else []

    optimizer.zero_grad(set_to_none=True)
    if parts.chunk is None:
        batch = prepare(batch)
        with autocast(), span("terms"):
            losses = parts.learner(batch, gather, sync.offset)
        losses = {name: loss * sync.weight for name, loss in losses.items()} if sync.weight != 1 else losses
        with span("backward"):
            losses["loss"].backward()  # DDP and FSDP average gradients over the ranks meanwhile
    else:
        with span("terms and backward"):
            losses = backward_in_chunks(
                learner, batch, parts.chunk, prepare, autocast, gather, sync.offset, sync.weight
            )
            average_gradients(parameters)

    with span("optimizer"):
        if learner.sharded:
            average_unsharded(parameters)
        grad_norm = clip_gradients(parameters, float("inf") if parts.grad_clip_norm is None else parts.grad_clip_norm)
        values = {name: loss.detach() for name, loss in losses.items()} | {"grad_norm": grad_norm}
        if parts.skip_nonfinite:
            values["loss"] = distributed.average(values["loss"].clone())  # all ranks must decide alike
            if not (torch.isfinite(values["loss"]) & torch.isfinite(grad_norm)):  # waits for the device
                for buffer, value in buffers:
                    buffer.copy_(value)
                learner.objective.discard_step()
                return values
        optimizer.step()
        learner.after_step()
        if parts.average is not None:
            parts.average(learner.model)
    return values


def _prepare(parts: StepParts, device: torch.device, batch: PairBatch) -> PairBatch:
    """Move a batch to the device and finish its images there."""
    with parts.span("views"):
        batch = batch.to(device, non_blocking=True)
        return replace(batch, views=apply_photometric(batch.views, parts.mean, parts.std))
