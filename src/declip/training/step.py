"""One step of training."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from declip.data.batch import PairBatch
from declip.data.image_views import ImageViews
from declip.training import distributed
from declip.training.distributed import Meeting
from declip.training.parallel import Learner, average_unsharded, clip_gradients, core


@dataclass
class StepParts:
    """What a step works on.

    Attributes:
        learner: The towers and the objective as one module, see `declip.training.parallel.build_learner`.
        optimizer: With the learning rate of this step already set.
        views: Finishes the photometric part of the image views on the device.
        average: Called after the update, for averaged weights; None without.
        clip_norm: Largest norm of the whole gradient; None leaves it.
        precision: "bf16" runs towers and heads in autocast; losses and logits stay float32.
        spare_bad: Leave everything as it was when the loss or a gradient is not finite; waits for the device.
    """

    learner: nn.Module
    optimizer: torch.optim.Optimizer
    views: ImageViews
    average: Callable[[nn.Module], None] | None = None
    clip_norm: float | None = None
    precision: str = "fp32"
    spare_bad: bool = False


def training_step(parts: StepParts, batch: PairBatch, meeting: Meeting | None = None) -> dict[str, Tensor]:
    """Move, augment, encode, gather, terms, backward, clip, step.

    Args:
        parts: See `StepParts`.
        batch: As the loader gives it, this rank's pairs: images uint8 (V, B, 3, H, W), texts (T, B, L).
        meeting: How many pairs each rank brings; None on one process.

    Returns:
        Detached scalars by term name, "total" and "grad_norm" (before clipping); the terms are this rank's, weighted
        so that their mean over ranks is the whole batch's. Nothing waits for the device.
    """
    learner = core(parts.learner)
    device = learner.model.device
    meeting = meeting or Meeting((len(batch),), stop=False)
    batch = batch.to(device, non_blocking=True)
    if batch.photometric is not None:
        images = parts.views.finish(batch.images, batch.photometric)
        batch = replace(batch, images=images, photometric=None)
    before = _Buffers(learner) if parts.spare_bad else None
    with torch.autocast(device.type, torch.bfloat16, enabled=parts.precision == "bf16"):
        terms = parts.learner(batch, distributed.gather(meeting.rows), meeting.offset)
    if meeting.share != 1:
        terms = {name: term * meeting.share for name, term in terms.items()}
    parts.optimizer.zero_grad(set_to_none=True)
    terms["total"].backward()
    parameters = [p for group in parts.optimizer.param_groups for p in group["params"]]
    if learner.sharded:
        average_unsharded(parameters)
    grad_norm = clip_gradients(parameters, float("inf") if parts.clip_norm is None else parts.clip_norm)
    result = {name: term.detach() for name, term in terms.items()} | {"grad_norm": grad_norm}
    if before is not None:
        result["total"] = distributed.average(result["total"].clone())
        if not (torch.isfinite(result["total"]) & torch.isfinite(grad_norm)):
            before.put_back()
            return result
    parts.optimizer.step()
    learner.objective.limit_scales(learner.model)
    if parts.average is not None:
        parts.average(learner.model)
    return result


class _Buffers:
    """What a forward pass changes: running statistics and the queue."""

    def __init__(self, learner: Learner) -> None:
        self._queue = learner.objective.queue
        self._values = [(buffer, buffer.clone()) for buffer in learner.buffers()]
        self._places = self._queue.get_extra_state() if self._queue is not None else None

    @torch.no_grad()
    def put_back(self) -> None:
        """Undo the forward pass."""
        for buffer, value in self._values:
            buffer.copy_(value)
        if self._queue is not None and self._places is not None:
            self._queue.set_extra_state(self._places)
