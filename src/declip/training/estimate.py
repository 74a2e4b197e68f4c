"""Estimate the time and memory of a run by a few of its steps, or by the features of a few pairs."""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

import numpy as np
import torch

from declip.data.pair import PairSource
from declip.evaluation.datasets import open_dataset
from declip.evaluation.encode import encode_source
from declip.io.text import duration, plural
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.training.assemble import assemble, resolve, resolve_epochs
from declip.training.fit import frozen_model
from declip.training.pairs import evaluation_tasks, open_training_source
from declip.training.parts import Parts
from declip.training.step import training_step

TIMED, ENCODED = 2, 32  # steps, after one that does not count, and pairs of each set


def estimate(recipe: Recipe) -> tuple[Recipe, str]:
    """Resolve a recipe, and estimate the time and memory of its run."""
    source = open_training_source(recipe)
    recipe = resolve_epochs(recipe, source)
    train, few = recipe.train, min(len(source), 2 * recipe.train.batch_size)
    small = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_pairs": few})})
    small._given = recipe.given
    with TemporaryDirectory() as folder:
        parts = assemble(small, Path(folder) / "run", quiet=True)
        steps = train.steps * fmean(step_seconds(parts, 1, TIMED))
        sets = [open_dataset(name).split("test") for name in evaluation_tasks(recipe, final=False)]
        count = 1 + (train.steps - 1) // train.evaluate_every if train.evaluate_every else 1
        evaluations = count * sum(_encoding_seconds(parts.model, pairs) for pairs in sets)
        memory = _peak(parts.model.device) / 2**30
    text = (
        f"{plural(train.steps, 'step')} of {train.batch_size:,} pairs at most, about {duration(steps + evaluations)} "
        f"(steps {duration(steps)}, evaluations {duration(evaluations)}), {memory:.1f} GiB of memory"
    )
    return parts.recipe.model_copy(update={"data": recipe.data}), text


def estimate_fit(recipe: Recipe) -> tuple[Recipe, str]:
    """Resolve the recipe of heads in closed form, and estimate the time of their features."""
    resolved = resolve(recipe)
    seconds = _encoding_seconds(frozen_model(resolved).to(resolved.device), resolved.source)
    return resolved.recipe, (
        f"Projections in closed form, without steps: about {seconds:,.0f} s for the features of "
        f"{plural(len(resolved.source), 'pair')}, less for those in the cache, then about 10 s for cross-validation."
    )


def _encoding_seconds(model: DualEncoder, pairs: PairSource) -> float:
    places = np.linspace(0, len(pairs) - 1, min(ENCODED, len(pairs))).astype(int)
    began = time.perf_counter()
    encode_source(model, pairs, indices=places)
    return (time.perf_counter() - began) * len(pairs) / len(places)


def step_seconds(parts: Parts, warm: int, count: int) -> list[float]:
    """Time steps of a run that is then discarded, loading included, without the first `warm`."""
    seconds = []
    parts.learner.train()
    with parts.loader, parts.lock or nullcontext():
        for _ in range(warm + count):
            began = time.perf_counter()
            batch = next(parts.loader)
            sync = parts.hosts.sync_step(0, len(batch), stop=False)
            training_step(parts.learner, parts.optimizer, batch, sync)["loss"].item()  # waits for the device
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
    return used if sys.platform == "darwin" else 1024 * used
