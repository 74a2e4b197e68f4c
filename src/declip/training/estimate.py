"""Estimate the time and memory of a run by a few of its steps."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
import torch

from declip.data.pair import PairSource
from declip.data.sources.checks import refuse_broken
from declip.evaluation.encode import encode_source
from declip.io.text import duration, plural
from declip.models.dual_encoder import DualEncoder
from declip.recipe.resolve import Facts, resolve
from declip.recipe.schema import Recipe
from declip.supervision.objective import NO_TERMS, Terms
from declip.training.assemble import assemble
from declip.training.pairs import open_training_source
from declip.training.state import Extensions, RunState
from declip.training.step import training_step

TIMED = 2  # steps, after one that does not count
ENCODED = 32  # pairs of each set


def estimate(recipe: Recipe, terms: Terms = NO_TERMS) -> str:
    """Estimate the time and memory of the run of a recipe, in a sentence."""
    source = open_training_source(recipe.data, recipe.seed)
    recipe = resolve(recipe, Facts(pairs=len(source)))
    train = recipe.train
    few = min(len(source), 2 * train.batch_size)
    refuse_broken(source, recipe.data.max_broken_fraction)
    # Of few pairs so many may be broken by chance that a run would stop.
    most_broken = max(0.5, recipe.data.max_broken_fraction)
    small = recipe.with_keys({"data.max_pairs": few, "data.max_broken_fraction": most_broken})
    with TemporaryDirectory() as folder:
        state = assemble(small, Path(folder) / "run", extensions=Extensions(terms=terms))
        steps = train.steps * fmean(step_seconds(state, 1, TIMED))
        names = state.held_out.tasks(state.recipe.evaluation, final=False)
        sets = [state.held_out.test(name) for name in names]
        count = 1
        if train.evaluate_every:
            count += (train.steps - 1) // train.evaluate_every
        evaluations = count * sum(encoding_seconds(state.model, pairs) for pairs in sets)
        memory = _peak(state.model.device) / 2**30
    return (
        f"{plural(train.steps, 'step')} of {train.batch_size:,} pairs at most, about {duration(steps + evaluations)} "
        f"(steps {duration(steps)}, evaluations {duration(evaluations)}), {memory:.1f} GiB of memory"
    )


def encoding_seconds(model: DualEncoder, pairs: PairSource) -> float:
    """Estimate the time to encode all pairs by that of a few, evenly spaced."""
    count = min(ENCODED, len(pairs))
    chosen = np.linspace(0, len(pairs) - 1, count).astype(int)
    began = time.perf_counter()
    encode_source(model, pairs, indices=chosen)
    seconds = time.perf_counter() - began
    return seconds * len(pairs) / count


def step_seconds(state: RunState, warm: int, count: int) -> list[float]:
    """Time steps of a run that is then discarded, loading included, without the first `warm`."""
    seconds = []
    state.learner.train()
    with state.loader, state.lock or nullcontext():
        for _ in range(warm + count):
            began = time.perf_counter()
            batch = next(state.loader)
            sync = state.hosts.sync_step(0, len(batch), stop=False)
            values = training_step(state.learner, state.optimizer, batch, sync)
            values["loss"].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
    return seconds[warm:]


def _peak(device: torch.device) -> int:
    """Bytes: of the device, or of this process where it trains on the CPU; 0 where it is unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return used
    return 1024 * used
