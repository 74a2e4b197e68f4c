"""The state of a run: its objects, its progress, and both in checkpoints, restored bit for bit."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

import declip
from declip.data.loader import Augment, PairLoader
from declip.data.pair import PairSource, SkipCounter
from declip.data.sources.open import NO_SOURCES, Sources
from declip.data.sources.pair_list import NO_LISTS, Lists
from declip.errors import UserError
from declip.evaluation.held_out import HeldOutSets
from declip.evaluation.results import Result, RetrievalResult, ZeroShotResult
from declip.interchange.weights import Weights
from declip.models.device import random_states, set_random_states
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Evaluation, Recipe
from declip.runs.checkpoint import Checkpoint, with_prefix, without_prefix
from declip.runs.folder import log
from declip.supervision.objective import NO_TERMS, Objective, Terms
from declip.training import distributed
from declip.training.distributed import HostGroup
from declip.training.optimizer import OptimizerFactory, load_moments, moments
from declip.training.pairs import TRAINING
from declip.training.parallel import full_tensor, load_full_state, unwrap
from declip.training.pretrained import Pretrained
from declip.training.sinks import Sink


@dataclass
class BestEvaluation:
    """The best evaluation of a run, which ends after `train.patience` others that were not better."""

    step: int = -1  # steps done before it; 0 for the pretrained weights
    score: float = -1.0
    loss: float = 0.0
    stale: int = 0  # evaluations since

    def update(self, step: int, results: Sequence[Result], evaluation: Evaluation) -> bool:
        """Record an evaluation; return whether it is the best so far.

        Its score is the mean R@1 of both directions on the recipe's retrieval sets or, without one, the mean top-1. The
        loss decides where it is equal: on few pairs it is lowest long before retrieval is best.
        """
        retrieved = list[RetrievalResult]()
        classified = list[ZeroShotResult]()
        for result in results:
            if isinstance(result, RetrievalResult) and result.dataset in evaluation.retrieval:
                retrieved.append(result)
            if isinstance(result, ZeroShotResult) and result.dataset in evaluation.zero_shot:
                classified.append(result)
        score = fmean(result.headline.value for result in retrieved or classified)
        losses = [result.loss or 0.0 for result in retrieved]
        loss = fmean(losses or [0.0])
        better = (score, -loss) > (self.score, -self.loss)
        if better:
            self.step = step
            self.score = score
            self.loss = loss
            self.stale = 0
        else:
            self.stale += 1
        return better


@dataclass
class Progress:
    """What a checkpoint keeps besides tensors."""

    step: int = 0  # number of steps done
    skipped: SkipCounter = field(default_factory=SkipCounter)  # counts of the broken pairs
    best: BestEvaluation | None = None  # the best evaluation, where `train.patience` watches them


class Extensions(NamedTuple):
    """What the caller adds to a recipe in Python, see `declip.train`."""

    callbacks: Sequence[Sink] = ()
    terms: Terms = NO_TERMS
    optimizer: OptimizerFactory | None = None
    augment: Augment | None = None
    sources: Sources = NO_SOURCES


class Prepared(NamedTuple):
    """What a fine-tuning has read already when its run begins."""

    held_out: HeldOutSets | None = None
    weights: Weights | None = None
    lists: Lists = NO_LISTS  # of a split, to be written into the run folder


NO_EXTENSIONS = Extensions()
NOTHING_PREPARED = Prepared()


@dataclass
class RunState:
    """A run before its next step, from `declip.training.assemble.assemble`."""

    recipe: Recipe  # resolved: precision, sizes and steps are set
    folder: Path
    extensions: Extensions
    hosts: HostGroup  # coordination between the ranks
    source: PairSource
    held_out: HeldOutSets
    model: DualEncoder
    objective: Objective
    # What was loaded, also from a text encoder; None where all weights are random
    pretrained: Pretrained | None
    learner: nn.Module  # model and objective as one module, distributed over the ranks
    optimizer: torch.optim.Optimizer
    loader: PairLoader  # batches of images and captions from the next step on
    workers: int  # number of loader processes
    # Hashes of some training pairs and of each held-out set, see `sample_hashes`
    samples: Mapping[str, list[str]]
    progress: Progress = field(default_factory=Progress)
    lock: FileIO | None = None  # of the run folder, on rank 0

    @property
    def sharded(self) -> bool:
        """Whether FSDP shards the model."""
        return unwrap(self.learner).sharded


def versions() -> dict[str, str]:
    """List everything outside the recipe that a result may depend on."""
    return {
        "declip": declip.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "processes": str(distributed.world_size()),
    }


def collect(state: RunState) -> Checkpoint | None:
    """Collect the state that the next step depends on: a collective of all ranks, of which rank 0 gets the result."""
    progress = state.progress
    rank_zero = distributed.is_rank_zero()
    # Rank 0's own state is among the objective's
    own = {} if rank_zero else state.objective.process_state()
    ranks = state.hosts.gather_on_rank_zero((random_states(state.model.device), own))
    if not (rank_zero or state.sharded):
        return None
    tensors = unwrap(state.learner).state_dict()  # "model.…" and "objective.…"
    tensors |= with_prefix("optimizer", moments(state.optimizer))
    weights = dict[str, Tensor]()
    training = dict[str, Tensor]()
    for name, tensor in tensors.items():
        part = weights if name.startswith("model.") else training
        part[name] = full_tensor(tensor)  # a collective
    if not rank_zero:
        return None
    for rank, (generators, heads) in enumerate(ranks):  # "random.0.cpu" and so on
        training |= with_prefix(f"random.{rank}", generators)
        training |= with_prefix(f"process.{rank}", heads)
    seen = progress.step * state.recipe.train.batch_size
    skipped = {**progress.skipped.to_dict(), "seen": seen}
    samples = dict(state.samples)
    extra: dict[str, Any] = {"versions": versions(), "skipped": skipped, "samples": samples}
    if progress.best is not None:
        extra["best"] = asdict(progress.best)
    return Checkpoint(progress.step, weights, training, state.recipe.to_yaml(), extra)


def restore(state: RunState, checkpoint: Checkpoint) -> None:
    """Set the state of a checkpoint on this rank."""
    extra = checkpoint.extra
    progress = state.progress
    _refuse_other_pairs(state, extra["samples"])
    try:
        load_weights(state, checkpoint)
        load_moments(state.optimizer, without_prefix("optimizer", checkpoint.training))
    except (RuntimeError, KeyError) as error:
        raise UserError(
            f"'{state.folder}' does not fit its recipe: {str(error).splitlines()[0]}. Choose another --out."
        ) from error
    # Another number of processes may lack some; those have the first one's.
    own = without_prefix(f"process.{distributed.rank()}", checkpoint.training)
    state.objective.load_state_dict(own, strict=False)
    generators = without_prefix(f"random.{distributed.rank()}", checkpoint.training)
    if generators:
        set_random_states(generators, state.model.device)
    else:  # a rank that the checkpoint does not know
        distributed.seed_rank(state.recipe.seed, checkpoint.step)
    progress.step = checkpoint.step
    progress.skipped = SkipCounter.from_dict(extra["skipped"])
    progress.best = None
    if "best" in extra:
        progress.best = BestEvaluation(**extra["best"])
    changed = []
    for name, value in versions().items():
        before = extra["versions"].get(name)
        if before != value:
            changed.append(f"{name} {before} → {value}")
    if changed and distributed.is_rank_zero():
        log.warning(
            "This differs from the checkpoint's: %s. Batches and their order stay the same, but sums may be rounded "
            "differently and dropout masks differ.",
            ", ".join(changed),
        )


def _refuse_other_pairs(state: RunState, before: Mapping[str, list[str]]) -> None:
    for name, now in state.samples.items():
        then = before.get(name, now)
        pairs = f"set '{name}'"
        if name == TRAINING:
            pairs = f"{name} '{state.source.name}'"
        # A broken pair, empty here, may be repaired.
        both = zip(then[1:], now[1:], strict=False)
        differ = sum(a != b for a, b in both if a and b)
        if differ or then[0] != now[0]:
            change = f"{differ} of {len(now) - 1} sampled keys or captions differ; {then[0]} pairs then, {now[0]} now"
            raise UserError(
                f"The {pairs} changed since '{state.folder}' stopped: {change}. Restore them, or choose another --out."
            )


def load_weights(state: RunState, checkpoint: Checkpoint) -> None:
    """Load a checkpoint's weights and heads."""
    for name, module in (("model", state.model), ("objective", state.objective)):
        load_full_state(module, without_prefix(name, {**checkpoint.weights, **checkpoint.training}))
