"""One step of training."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from declip.data.batch import PairBatch
from declip.data.images.crops import apply_photometric
from declip.training import distributed
from declip.training.clock import Span, untimed
from declip.training.distributed import StepSync
from declip.training.gradient_cache import backward_in_chunks
from declip.training.learner import Learner
from declip.training.parallel import average_gradients, average_unsharded, clip_gradients, core


@dataclass
class StepParts:
    """What a step works on.

    Attributes:
        learner: The towers and the objective as one module, see `declip.training.learner.build_learner`.
        optimizer: With the learning rate of this step already set.
        mean, std: (3,) float32 on the device, statistics of the images.
        average: Called after the update, for averaged weights; None without.
        grad_clip_norm: Largest norm of the whole gradient; None leaves it.
        precision: "bf16" runs towers and heads in autocast; losses and logits stay float32.
        chunk: Pairs that the towers see at a time, see `declip.training.gradient_cache`; None for all.
        span: Gives a context for each part of the step, to be timed.
        skip_nonfinite: Leave everything as it was when the loss or a gradient is not finite; waits for the device.
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


def training_step(parts: StepParts, batch: PairBatch, meeting: StepSync | None = None) -> dict[str, Tensor]:
    """Move, augment, encode, gather, terms, backward, clip, step.

    Args:
        parts: See `StepParts`.
        batch: As the loader gives it, this rank's pairs: views uint8 (B, 3, S, S), texts (T, B, L).
        meeting: How many pairs each rank brings; None on one process.

    Returns:
        Detached scalars by term name, "loss" and "grad_norm" (before clipping); the terms are this rank's, weighted
        so that their mean over ranks is the whole batch's. Nothing waits for the device.
    """
    learner = core(parts.learner)
    device = learner.model.device
    meeting = meeting or StepSync((len(batch),), stop=False)
    before = _Buffers(learner) if parts.skip_nonfinite else None
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=parts.precision == "bf16")
    everyone = (distributed.gather(meeting.rows), meeting.offset)
    prepare = partial(_on_device, parts, device)
    parts.optimizer.zero_grad(set_to_none=True)
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
    if parts.chunk is not None:
        with parts.span("terms and backward"):
            terms = backward_in_chunks(learner, batch, parts.chunk, prepare, autocast, *everyone, meeting.share)
            average_gradients(parameters)
    else:
        batch = prepare(batch)
        with autocast(), parts.span("terms"):
            terms = parts.learner(batch, *everyone)
        if meeting.share != 1:
            terms = {name: term * meeting.share for name, term in terms.items()}
        with parts.span("backward"):
            terms["loss"].backward()
    with parts.span("optimizer"):
        return _update(parts, learner, parameters, terms, before)


def _update(
    parts: StepParts,
    learner: Learner,
    parameters: list[Tensor],
    terms: dict[str, Tensor],
    before: "_Buffers | None",
) -> dict[str, Tensor]:
    """Clip, step, limit the scales, average the weights."""
    if learner.sharded:
        average_unsharded(parameters)
    grad_norm = clip_gradients(parameters, float("inf") if parts.grad_clip_norm is None else parts.grad_clip_norm)
    result = {name: term.detach() for name, term in terms.items()} | {"grad_norm": grad_norm}
    if before is not None:
        result["loss"] = distributed.average(result["loss"].clone())
        if not (torch.isfinite(result["loss"]) & torch.isfinite(grad_norm)):
            before.put_back()
            learner.objective.discard_step()
            return result
    parts.optimizer.step()
    learner.after_step()
    if parts.average is not None:
        parts.average(learner.model)
    return result


def _on_device(parts: StepParts, device: torch.device, batch: PairBatch) -> PairBatch:
    """Move a batch and finish its images there."""
    with parts.span("views"):
        batch = batch.to(device, non_blocking=True)
        return replace(batch, views=apply_photometric(batch.views, parts.mean, parts.std))


class _Buffers:
    """The buffers that a forward pass changes: running statistics of batch norm."""

    def __init__(self, learner: Learner) -> None:
        self._values = [(buffer, buffer.clone()) for buffer in learner.buffers()]

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo the forward pass."""
        for buffer, value in self._values:
            buffer.copy_(value)
