"""Collect the state of a run for a checkpoint, and restore it bit for bit."""

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import timm
import torch

from declip.data.pair import SkipCounter
from declip.errors import UserError
from declip.models.device import random_states, set_random_states
from declip.runs.checkpoint import Checkpoint, part, prefixed
from declip.runs.folder import log
from declip.training import distributed
from declip.training.optimizer import load_moments, moments
from declip.training.pairs import TRAINING
from declip.training.parallel import full_tensor, load_full_state, unwrap
from declip.training.parts import Parts
from declip.training.stopping import BestEvaluation


def versions() -> dict[str, str]:
    """List everything outside the recipe that a result may depend on."""
    return {
        "declip": version("declip"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "processes": str(distributed.world_size()),
    }


def collect(parts: Parts) -> Checkpoint | None:
    """Collect the state that the next step depends on: a collective of all ranks, of which rank 0 gets the result.

    Generators of all ranks are stored by rank: "random.0.cpu" and so on.
    """
    progress, rank_zero = parts.progress, distributed.is_rank_zero()
    generators = parts.hosts.gather_objects(random_states(parts.model.device))
    if not (rank_zero or parts.sharded):
        return None
    state = dict(unwrap(parts.learner).state_dict())  # "model.…" and "objective.…"
    weights = {name: state.pop(name) for name in list(state) if name.startswith("model.")}
    training = state | prefixed("optimizer", moments(parts.optimizer))
    if parts.sharded:
        weights = {name: full_tensor(tensor) for name, tensor in weights.items()}
        training = {name: full_tensor(tensor) for name, tensor in training.items()}
    for rank, states in enumerate(generators):
        training |= prefixed(f"random.{rank}", states)
    extra: dict[str, Any] = {
        "versions": versions(),
        "skipped": {**progress.skipped.to_dict(), "seen": progress.step * parts.recipe.train.batch_size},
        "samples": dict(parts.samples),
        **({} if progress.best is None else {"best": asdict(progress.best)}),
    }
    return Checkpoint(progress.step, weights, training, parts.recipe.to_yaml(), extra) if rank_zero else None


def restore(parts: Parts, found: Checkpoint) -> None:
    """Set the state of a checkpoint on this rank."""
    extra, progress = found.extra, parts.progress
    _refuse_other_pairs(parts, extra["samples"])
    try:
        load_weights(parts, found)
        load_moments(parts.optimizer, part("optimizer", found.training))
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"The newest checkpoint in '{parts.folder}' does not fit the recipe of its run: "
            f"{str(error).splitlines()[0]}. Start a new run with --out."
        ) from error
    generators = part(f"random.{distributed.rank()}", found.training)
    if generators:
        set_random_states(generators, parts.model.device)
    else:  # a rank that the checkpoint does not know
        distributed.seed_rank(parts.recipe.seed, found.step)
    progress.step = found.step
    progress.skipped = SkipCounter.from_dict(extra["skipped"])
    progress.best = BestEvaluation(**extra["best"]) if "best" in extra else None
    then, now = extra["versions"], versions()
    changed = [f"{name} {then.get(name)} → {value}" for name, value in now.items() if then.get(name) != value]
    if changed and distributed.is_rank_zero():
        log.warning(
            "This differs from the checkpoint's: %s. Batches and their order stay the same, but sums may be rounded "
            "differently and dropout masks differ.",
            ", ".join(changed),
        )


def _refuse_other_pairs(parts: Parts, before: Mapping[str, list[str]]) -> None:
    """Raise an error if the training pairs or a held-out set are not those of the checkpoint."""
    for name, now in parts.samples.items():
        then, pairs = before.get(name, now), f"{name} '{parts.source.name}'" if name == TRAINING else f"set '{name}'"
        # A broken pair, empty here, may be repaired.
        differ = sum(a != b for a, b in zip(then[1:], now[1:], strict=False) if a and b)
        change = f"{differ} of {len(now) - 1} sampled keys or captions differ" if differ else ""
        if then[0] != now[0]:
            change = f"{int(then[0]):,} pairs then, {int(now[0]):,} now"
        if change:
            raise UserError(
                f"The {pairs} changed since the run in '{parts.folder}' stopped: {change}. Restore them, or start a "
                "new run with --out."
            )


def load_weights(parts: Parts, found: Checkpoint) -> None:
    """Load a checkpoint's weights and heads."""
    for name, module in (("model", parts.model), ("objective", parts.objective)):
        load_full_state(module, part(name, {**found.weights, **found.training}))
