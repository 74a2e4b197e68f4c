"""GradCache: large batches on small devices, with towers that see a batch in chunks (Gao et al., arXiv 2101.06983).

The outputs of the towers are computed without a graph, chunk after chunk; the losses and their gradient with respect to
these outputs are computed for the whole batch; then each chunk is computed again, with a graph, and its part of that
gradient goes backward through it. Exact where a pair's output depends on that pair alone, so not for towers with batch
norm. Heads, queue and loss matrices see the whole batch.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from declip.data.batch import PairBatch
from declip.models.blocks import statistics_at_rest
from declip.supervision.objective import Gather
from declip.supervision.tower_outputs import TowerOutputs, joined, split_like
from declip.training.learner import Learner
from declip.training.setup import random_states, set_random_states


def backward_in_chunks(
    learner: Learner,
    batch: PairBatch,
    chunk: int,
    to_device: Callable[[PairBatch], PairBatch],
    autocast: Callable[[], AbstractContextManager[object]],
    gather: Gather,
    offset: int,
    weight: float = 1.0,
) -> dict[str, Tensor]:
    """Compute the losses of a batch and add the gradient of the total to every parameter's.

    Args:
        batch: This rank's pairs, on the host.
        chunk: Number of pairs that the towers see at a time.
        to_device: Moves a chunk and finishes its images.
        autocast: Context of the forward passes of towers and heads.
        gather, offset: See `Objective.forward`, as for the result.
        weight: Factor of the losses.
    """
    model, objective = learner.model, learner.objective
    parts = [batch.rows(start, min(start + chunk, len(batch))) for start in range(0, len(batch), chunk)]
    outputs: list[TowerOutputs] = []
    states: list[dict[str, Tensor]] = []
    with torch.no_grad(), statistics_at_rest(model):
        for part in parts:
            states.append(random_states(model.device))
            ready = to_device(part)
            with autocast():
                outputs.append(objective.run_towers(model, ready))
    final_states = random_states(model.device)
    whole = joined(outputs)
    leaves = {name: tensor for name, tensor in whole.tensors().items() if tensor.is_floating_point()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    rest = batch.without_images().to(model.device, non_blocking=True)
    with autocast():
        losses = objective.losses(whole, model, rest, gather, offset)
    losses = {name: loss * weight for name, loss in losses.items()} if weight != 1 else losses
    losses["loss"].backward()
    gradients = {name: split_like(name, leaf.grad, outputs) for name, leaf in leaves.items() if leaf.grad is not None}
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        set_random_states(state, model.device)  # dropout must sample the same masks as in the first pass
        ready = to_device(part)
        with autocast():
            again = objective.run_towers(model, ready).tensors()
        names = [name for name in gradients if again[name].requires_grad]
        torch.autograd.backward([again[name] for name in names], [gradients[name][number] for name in names])
    set_random_states(final_states, model.device)
    return losses
