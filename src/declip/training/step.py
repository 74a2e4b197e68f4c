"""One step of training."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from declip.data.batch import PairBatch
from declip.data.image_views import ImageViews
from declip.models.dual_encoder import DualEncoder
from declip.supervision.objective import Objective
from declip.training import distributed


@dataclass
class StepParts:
    """What a step works on.

    Attributes:
        model, objective: What learns.
        optimizer: With the learning rate of this step already set.
        views: Finishes the photometric part of the image views on the device.
        average: Called after the update, for averaged weights; None without.
        clip_norm: Largest norm of the whole gradient; None leaves it.
        precision: "bf16" runs towers and heads in autocast; losses and logits stay float32.
    """

    model: DualEncoder
    objective: Objective
    optimizer: torch.optim.Optimizer
    views: ImageViews
    average: Callable[[nn.Module], None] | None = None
    clip_norm: float | None = None
    precision: str = "fp32"


def training_step(parts: StepParts, batch: PairBatch) -> dict[str, Tensor]:
    """Move, augment, encode, gather, terms, backward, clip, step.

    Args:
        parts: See `StepParts`.
        batch: As the loader gives it: images uint8 (V, B, 3, H, W), texts (T, B, L).

    Returns:
        Detached scalars by term name, "total" and "grad_norm" (before clipping). Nothing waits for the device.
    """
    model, objective, device = parts.model, parts.objective, parts.model.device
    batch = batch.to(device, non_blocking=True)
    if batch.photometric is not None:
        images = parts.views.finish(batch.images, batch.photometric)
        batch = replace(batch, images=images, photometric=None)
    with torch.autocast(device.type, torch.bfloat16, enabled=parts.precision == "bf16"):
        terms = objective(model, batch, distributed.gather(), distributed.rank())
    parts.optimizer.zero_grad(set_to_none=True)
    terms["total"].backward()
    learners = [p for group in parts.optimizer.param_groups for p in group["params"]]
    limit = float("inf") if parts.clip_norm is None else parts.clip_norm
    grad_norm = nn.utils.clip_grad_norm_(learners, limit)
    parts.optimizer.step()
    objective.limit_scales(model)
    if parts.average is not None:
        parts.average(model)
    return {name: term.detach() for name, term in terms.items()} | {"grad_norm": grad_norm}
