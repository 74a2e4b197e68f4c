"""Large batches on small devices: the towers see a batch in chunks, the terms see it whole (Gao et al. 2021).

GradCache (arXiv 2101.06983): the outputs of the towers are computed without a graph, chunk after chunk; the terms and
their gradient with respect to these outputs are computed for the whole batch; then each chunk is computed again, with
a graph, and its part of that gradient sent through. Exact where a pair's output depends on that pair alone, so not for
towers with batch norm. Heads, queue and loss matrices see the whole batch.
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


def backward_in_chunks(
    learner: Learner,
    batch: PairBatch,
    chunk: int,
    to_device: Callable[[PairBatch], PairBatch],
    autocast: Callable[[], AbstractContextManager[object]],
    gather: Gather,
    offset: int,
    share: float = 1.0,
) -> dict[str, Tensor]:
    """Compute the terms of a batch and add the gradient of the total to every parameter's.

    Args:
        learner: Towers and objective.
        batch: This rank's pairs, where the loader left them.
        chunk: Pairs that the towers see at a time.
        to_device: Moves a part of a batch to the device and finishes its images.
        autocast: Precision of towers and heads.
        gather, offset: See `Objective.forward`.
        share: What the terms are multiplied by.

    Returns:
        The terms and the total, as `Objective.forward`.
    """
    model, objective = learner.model, learner.objective
    parts = [batch.rows(start, min(start + chunk, len(batch))) for start in range(0, len(batch), chunk)]
    outputs: list[TowerOutputs] = []
    states: list[list[Tensor]] = []
    with torch.no_grad(), statistics_at_rest(model):
        for part in parts:
            states.append(_generators(model.device))
            ready = to_device(part)
            with autocast():
                outputs.append(objective.run_towers(model, ready))
    ends = _generators(model.device)
    whole = joined(outputs)
    leaves = {name: tensor for name, tensor in whole.tensors().items() if tensor.is_floating_point()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    with autocast():
        terms = objective.losses(
            whole, model, batch.without_images().to(model.device, non_blocking=True), gather, offset
        )
    terms = {name: term * share for name, term in terms.items()} if share != 1 else terms
    terms["loss"].backward()
    gradients = {name: split_like(name, leaf.grad, outputs) for name, leaf in leaves.items() if leaf.grad is not None}
    for number, (part, state) in enumerate(zip(parts, states, strict=True)):
        _set_generators(state, model.device)
        ready = to_device(part)
        with autocast():
            again = objective.run_towers(model, ready).tensors()
        names = [name for name in gradients if again[name].requires_grad]
        torch.autograd.backward([again[name] for name in names], [gradients[name][number] for name in names])
    _set_generators(ends, model.device)
    return terms


def _generators(device: torch.device) -> list[Tensor]:
    """The states that dropout draws from: the second pass must draw the same."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
