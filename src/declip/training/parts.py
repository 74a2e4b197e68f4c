"""The objects that a run is made of, and the state that changes from step to step."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import torch
from torch import nn

from declip.data.loader import PairLoader
from declip.data.pair import PairSource, SkipCounter
from declip.data.plan import Plan
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training.distributed import HostGroup
from declip.training.parallel import unwrap
from declip.training.pretrained import Pretrained
from declip.training.sinks import Sink
from declip.training.stopping import BestEvaluation


@dataclass
class Progress:
    """What a checkpoint keeps besides tensors."""

    step: int = 0  # number of steps done
    skipped: SkipCounter = field(default_factory=SkipCounter)  # counts of the broken pairs
    best: BestEvaluation | None = None  # the best evaluation, where `train.patience` watches them


@dataclass
class Parts:
    """A run before its next step, from `declip.training.assemble.assemble`."""

    recipe: Recipe  # resolved: precision, sizes and steps are set
    folder: Path
    quiet: bool
    callbacks: Sequence[Sink]
    hosts: HostGroup  # coordination between the ranks
    source: PairSource
    plan: Plan
    model: DualEncoder
    objective: Objective
    pretrained: Pretrained | None  # what was loaded, also from a text encoder; None where all weights are random
    learner: nn.Module  # model and objective as one module, distributed over the ranks
    optimizer: torch.optim.Optimizer
    loader: PairLoader  # batches of images and captions from the next step on
    workers: int  # number of loader processes
    samples: Mapping[str, list[str]]  # hashes of some training pairs and of each held-out set, see `sample_hashes`
    progress: Progress = field(default_factory=Progress)
    lock: FileIO | None = None  # of the run folder, on rank 0

    @property
    def sharded(self) -> bool:
        """Whether FSDP shards the model."""
        return unwrap(self.learner).sharded
