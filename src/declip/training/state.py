"""Everything that a run's next step depends on: taken into a checkpoint, and put back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from declip.data.pair import SkipCounter
from declip.errors import UserError
from declip.runs import checkpoint as checkpoints
from declip.runs.folder import log
from declip.training import distributed
from declip.training.parallel import load_full_state, shard_like, whole
from declip.training.setup import random_states, versions

if TYPE_CHECKING:
    from declip.training.trainer import Trainer


def capture(trainer: Trainer) -> checkpoints.Checkpoint | None:
    """The state of a run; every rank must ask, and the first one gets it.

    Generators of all ranks are kept, by rank: "random.0.cpu" and so on.
    """
    sharded = trainer.recipe.train.strategy == "fsdp" and distributed.world_size() > 1
    generators = trainer.council.collect(random_states(trainer.device))
    if not (trainer.leads or sharded):
        return None
    weights = checkpoints.prefixed("model", trainer.model.state_dict())
    if trainer.average is not None:
        weights |= checkpoints.prefixed("average", trainer.average.module.state_dict())
    training = checkpoints.prefixed("objective", trainer.objective.state_dict())
    training |= checkpoints.prefixed("optimizer", checkpoints.optimizer_tensors(trainer.optimizer))
    if sharded:
        weights = {name: whole(tensor) for name, tensor in weights.items()}
        training = {name: whole(tensor) for name, tensor in training.items()}
    for number, states in enumerate(generators):
        training |= checkpoints.prefixed(f"random.{number}", states)
    if trainer.average is not None:
        training["averaged_steps"] = trainer.average.n_averaged
    extra = {
        "versions": versions(),
        "skipped": trainer.counts(),
        "ranks": distributed.world_size(),
        "pairs": len(trainer.source),
        "bad_steps": trainer.bad_steps.left_out,
    }
    if not trainer.leads:
        return None
    return checkpoints.Checkpoint(trainer.step, weights, training, trainer.recipe.to_yaml(), extra)


def restore(trainer: Trainer, found: checkpoints.Checkpoint) -> None:
    """Put everything back as it was after that checkpoint's step, on this rank.

    Raises:
        UserError: the source holds another number of pairs than it did: other batches would follow.
    """
    pairs = found.extra.get("pairs", len(trainer.source))
    if pairs != len(trainer.source):
        raise UserError(
            f"'{trainer.source.name}' holds {len(trainer.source):,} pairs; when the run in '{trainer.folder}' stopped "
            f"it held {pairs:,}. Its order would change in the middle of an epoch. Give the pairs as they were, or "
            "start a run in another folder with --out."
        )
    trainer.step = found.step
    load_full_state(trainer.model, checkpoints.part("model", found.weights))
    load_full_state(trainer.objective, checkpoints.part("objective", found.training))
    moments = checkpoints.part("optimizer", found.training)
    ranks = int(found.extra.get("ranks", 1))
    sharded = trainer.recipe.train.strategy == "fsdp" and (ranks > 1) != (distributed.world_size() > 1)
    if sharded and any(name.split(".")[0].isdecimal() for name in moments):
        raise UserError(
            f"The checkpoint of step {found.step} in '{trainer.folder}' is of a version that numbered the optimizer's "
            f"moments, in another order on several processes than on one. Resume it on {ranks} "
            f"{'process' if ranks == 1 else 'processes'}; checkpoints that are written then resume on any number."
        )
    checkpoints.load_optimizer(trainer.optimizer, moments, shard_like)
    if trainer.average is not None:
        trainer.average.module.load_state_dict(checkpoints.part("average", found.weights))
        trainer.average.n_averaged.copy_(found.training["averaged_steps"])
    _restore_generators(trainer, found)
    trainer.skipped = SkipCounter.from_dict(found.extra["skipped"])
    trainer.bad_steps.left_out = list(found.extra.get("bad_steps", []))
    now, then = versions(), found.extra["versions"]
    changed = [f"{name} {then.get(name)} → {now[name]}" for name in now if then.get(name) != now[name]]
    if changed and trainer.leads:
        log.warning("Versions differ from the checkpoint's, so bits may too: %s", ", ".join(changed))


def _restore_generators(trainer: Trainer, found: checkpoints.Checkpoint) -> None:
    """A rank that the checkpoint does not know starts a stream of its own."""
    ranks = int(found.extra.get("ranks", 1))
    if ranks != distributed.world_size() and trainer.leads:
        log.warning(
            "The checkpoint is of %d processes, now there are %d: the batches and their order stay, sums are rounded "
            "otherwise, and dropout, where a tower has it, draws anew.",
            ranks,
            distributed.world_size(),
        )
    number = distributed.rank()
    states: dict[str, Tensor] = checkpoints.part(f"random.{number}", found.training)
    if not states:
        states = checkpoints.part("random", found.training) if ranks == 1 and number == 0 else {}
    if "cpu" not in states:
        seed_rank(trainer.recipe.seed, found.step)
        return
    torch.set_rng_state(states["cpu"])
    if trainer.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], trainer.device)


def seed_rank(seed: int, step: int) -> None:
    """Give torch's generators of this rank a stream of their own, so that no two ranks draw the same dropout masks."""
    torch.manual_seed(seed + 7919 * (distributed.rank() + 1) + step)
