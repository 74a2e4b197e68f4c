"""One step of training."""

import math

import torch
from torch import Tensor, nn

from declip.data.batch import PairBatch
from declip.models.device import random_states, set_random_states
from declip.models.layers import frozen_batch_norm_stats
from declip.supervision.objective import Gather
from declip.supervision.term import TowerOutputs, join_outputs
from declip.training import distributed
from declip.training.distributed import StepSync
from declip.training.parallel import (
    Learner,
    average_gradients,
    clip_gradients,
    grad_cache_chunk,
    unwrap,
)


def training_step(
    learner: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: PairBatch,
    sync: StepSync | None = None,
) -> dict[str, Tensor]:
    """Take one training step: move, augment, encode, gather, losses, backward, clip, update.

    The learner is from `build_learner`; the batch has this rank's pairs: views uint8 (B, 3, S, S), texts (T, B, L).
    Returns detached scalars: the losses by name, "loss" and "grad_norm" (before clipping). The mean of the losses over
    the ranks is the whole batch's. Nothing waits for the device.
    """
    sync = sync or StepSync((len(batch),), stop=False)
    count = sync.rows[distributed.rank()]
    assert all(len(view) == count for view in batch.views.values()), "(B, 3, S, S) each"
    assert batch.texts.shape[1] == count, "(T, B, L)"
    inner = unwrap(learner)
    train = inner.objective.recipe.train
    gather = distributed.gather(sync.rows)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    optimizer.zero_grad(set_to_none=True)
    chunk = grad_cache_chunk(train)
    if chunk is None:
        batch = inner.prepare(batch)
        with inner.autocast():
            losses = learner(batch, gather, sync.offset)
        losses = {name: loss * sync.weight for name, loss in losses.items()}
        losses["loss"].backward()  # DDP and FSDP average gradients over the ranks meanwhile
    else:
        losses = _backward_in_chunks(inner, chunk, batch, gather, sync)

    if inner.sharded or chunk is not None:  # DDP has done it
        average_gradients(parameters)
    limit = train.grad_clip_norm
    if limit is None:
        limit = math.inf
    grad_norm = clip_gradients(parameters, limit)
    values = {name: loss.detach() for name, loss in losses.items()}
    values["grad_norm"] = grad_norm
    optimizer.step()
    inner.objective.after_step(inner.model)  # limits the scales, and writes the queue
    return values


def _backward_in_chunks(
    learner: Learner, chunk: int, batch: PairBatch, gather: Gather | None, sync: StepSync
) -> dict[str, Tensor]:
    """GradCache: large batches on small devices, with towers that see a batch in chunks (Gao et al., arXiv 2101.06983).

    The outputs of the towers are computed without a graph, chunk after chunk; the losses and their gradient with
    respect to these outputs for the whole batch; then each chunk again, with a graph, through which its part of that
    gradient goes backward. Exact where a pair's output depends on that pair alone, so not for towers with batch norm.
    """
    model = learner.model
    objective = learner.objective
    starts = range(0, len(batch), chunk)
    chunks = [batch.rows(start, min(start + chunk, len(batch))) for start in starts]
    outputs: list[TowerOutputs] = []
    states: list[dict[str, Tensor]] = []
    with torch.no_grad(), frozen_batch_norm_stats(model):
        for part in chunks:
            states.append(random_states(model.device))
            ready = learner.prepare(part)
            with learner.autocast():
                outputs.append(objective.run_towers(model, ready))
    final_states = random_states(model.device)
    leaves: list[dict[str, Tensor]] = []
    for output in outputs:
        floats = {n: t for n, t in output.tensors().items() if t.is_floating_point()}
        leaves.append({name: tensor.requires_grad_() for name, tensor in floats.items()})
    rest = learner.prepare(batch) if objective.reads_pixels else batch.without_images()
    rest = rest.to(model.device, non_blocking=True)
    with learner.autocast():
        losses = objective.losses(join_outputs(outputs), model, rest, gather, sync.offset)
    losses = {name: loss * sync.weight for name, loss in losses.items()}
    losses["loss"].backward()
    for part, state, first in zip(chunks, states, leaves, strict=True):
        # Dropout must sample the same masks as in the first pass
        set_random_states(state, model.device)
        ready = learner.prepare(part)
        with learner.autocast():
            again = objective.run_towers(model, ready).tensors()
        outer = []
        gradients = []
        for name, leaf in first.items():
            if leaf.grad is not None and again[name].requires_grad:
                outer.append(again[name])
                gradients.append(leaf.grad)
        torch.autograd.backward(outer, gradients)
    set_random_states(final_states, model.device)
    return losses
