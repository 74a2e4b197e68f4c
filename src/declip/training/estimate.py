"""Estimate the time and memory of a run by a few of its steps."""

import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from declip.data.columns import Columns
from declip.data.pair import PairSource
from declip.data.sources.open import NO_SOURCES, Sources
from declip.evaluation.encode import encode_source
from declip.io.text import duration, plural
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training.assemble import assemble, plan_of, resolve_epochs
from declip.training.evaluations import evaluation_tasks, open_held_out
from declip.training.pairs import open_training_source, refuse_broken
from declip.training.state import Extensions, RunState
from declip.training.step import training_step

TIMED, ENCODED = 2, 32  # steps, after one that does not count, and pairs of each set


def estimate(recipe: Recipe, sources: Sources = NO_SOURCES) -> tuple[Recipe, str]:
    """Resolve a recipe, and estimate the time and memory of its run."""
    source = open_training_source(recipe, sources)
    recipe = resolve_epochs(recipe, source)
    train, few = recipe.train, min(len(source), 2 * recipe.train.batch_size)
    refuse_broken(source, recipe.data.max_broken_fraction)
    # Of few pairs so many may be broken by chance that a run would stop.
    limits = {"max_pairs": few, "max_broken_fraction": max(0.5, recipe.data.max_broken_fraction)}
    small = recipe.model_copy(update={"data": recipe.data.model_copy(update=limits)})
    with TemporaryDirectory() as folder:
        state = assemble(small, Path(folder) / "run", quiet=True, extensions=Extensions(sources=sources))
        steps = train.steps * fmean(step_seconds(state, 1, TIMED))
        names, columns = evaluation_tasks(recipe, final=False), Columns.of(recipe.data)
        sets = [open_held_out(name, columns, sources).split("test") for name in names]
        count = 1 + (train.steps - 1) // train.evaluate_every if train.evaluate_every else 1
        evaluations = count * sum(encoding_seconds(state.model, pairs) for pairs in sets)
        memory = _peak(state.model.device) / 2**30
    text = (
        f"{plural(train.steps, 'step')} of {train.batch_size:,} pairs at most, about {duration(steps + evaluations)} "
        f"(steps {duration(steps)}, evaluations {duration(evaluations)}), {memory:.1f} GiB of memory"
    )
    return state.recipe.model_copy(update={"data": recipe.data}), text


def encoding_seconds(model: DualEncoder, pairs: PairSource, **options: Any) -> float:
    """Estimate the time to encode all pairs by that of a few, evenly spaced; options are those of `encode_source`."""
    chosen = np.linspace(0, len(pairs) - 1, min(ENCODED, len(pairs))).astype(int)
    began = time.perf_counter()
    encode_source(model, pairs, indices=chosen, **options)
    return (time.perf_counter() - began) * len(pairs) / len(chosen)


def step_seconds(state: RunState, warm: int, count: int) -> list[float]:
    """Time steps of a run that is then discarded, loading included, without the first `warm`."""
    seconds = []
    state.learner.train()
    with state.loader, state.lock or nullcontext():
        for _ in range(warm + count):
            began = time.perf_counter()
            batch = next(state.loader)
            sync = state.hosts.sync_step(0, len(batch), stop=False)
            training_step(state.learner, state.optimizer, batch, sync)["loss"].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
    return seconds[warm:]


@dataclass(frozen=True)
class Cost:
    """Operations and memory of a training step, counted from the towers without computing it."""

    flops: float  # per pair, forward and backward; a multiplication and an addition are two, as peaks are given
    activations: float  # bytes per pair that the backward pass reads
    states: int  # bytes of weights, gradients, moments of the optimizer and the queue, on each GPU


def count_cost(recipe: Recipe, caption_length: int) -> Cost:
    """Count the operations and the memory of both towers for all views of a pair.

    The losses and their heads are left out of the operations: they are about 1 % of DeCLIP's with ViT-B/32.

    Args:
        caption_length: Token ids of a caption, padding included.
    """
    plan, train, size = plan_of(recipe), recipe.train, recipe.image.size
    with torch.device("meta"):
        model = DualEncoder.from_recipe(recipe).train()
        objective = Objective(recipe, model)
    weights = [p for module in (model, objective) for p in module.parameters()]
    trained = 16 if train.optimizer == "adamw" else 12  # weight, gradient, two moments or one
    states = sum((trained if p.requires_grad else 4) * p.numel() for p in weights) + sum(
        buffer.numel() * buffer.element_size() for buffer in objective.buffers()
    )
    # A caption that the contrastive loss sees unmasked is encoded a second time for the masked words.
    texts = plan.texts + (plan.mask_probability is not None and recipe.views.text.mask is False)
    passes = 1 + (train.grad_checkpointing or train.grad_cache_chunk is not None)
    flops, activations = 0.0, 0.0
    with FakeTensorMode(allow_non_fake_inputs=True):  # shapes without values
        model.to_empty(device="cpu")
        images, tokens = torch.zeros(4, 3, size, size), torch.ones(4, caption_length, dtype=torch.int64)
        for tower, inputs, views in ((model.image_tower, images, len(plan.views)), (model.text_tower, tokens, texts)):
            forward, backward = _flops(tower, inputs)
            flops += views * (passes * forward + backward) / 4
            # The difference leaves out what is saved once for a batch, such as weights cast to bfloat16.
            four, two = (_saved_bytes(tower, inputs[:n], train.precision != "fp32") for n in (4, 2))
            activations += views * (four - two) / 2
    return Cost(flops, activations, states)


def _flops(tower: nn.Module, inputs: Tensor) -> tuple[int, int]:
    """Operations forward and backward; torch counts attention where it is a product of matrices."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        features = tower(inputs).pooled
        forward = counter.get_total_flops()
        if features.requires_grad:
            features.sum().backward()
    return forward, counter.get_total_flops() - forward


def _saved_bytes(tower: nn.Module, inputs: Tensor, bf16: bool) -> int:
    """Bytes that a forward pass saves for the backward pass."""
    saved = {}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), hooks:
        tower(inputs)
    return sum(saved.values())


def _peak(device: torch.device) -> int:
    """Bytes: of the device, or of this process where it trains on the CPU; 0 where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
