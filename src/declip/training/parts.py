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
    """What a checkpoint keeps besides tensors.

    Attributes:
        step: Number of steps done.
        skipped: Counts of the broken pairs.
        best: The best evaluation, where `train.patience` watches them.
    """

    step: int = 0
    skipped: SkipCounter = field(default_factory=SkipCounter)
    best: BestEvaluation | None = None


@dataclass
class Parts:
    """A run before its next step, from `declip.training.assemble.assemble`.

    Attributes:
        recipe: Resolved: precision, sizes and steps are set.
        hosts: Coordination between the ranks.
        pretrained: What was loaded from `finetune.pretrained` or a text encoder; None where all weights are random.
        learner: Model and objective as one module, distributed over the ranks.
        loader: Batches of images and captions from the next step on.
        workers: Number of loader processes.
        samples: Hashes of some training pairs and of each held-out set, see `sample_hashes`.
        lock: Of the run folder, on rank 0.
    """

    recipe: Recipe
    folder: Path
    quiet: bool
    callbacks: Sequence[Sink]
    hosts: HostGroup
    source: PairSource
    plan: Plan
    model: DualEncoder
    objective: Objective
    pretrained: Pretrained | None
    learner: nn.Module
    optimizer: torch.optim.Optimizer
    loader: PairLoader
    workers: int
    samples: Mapping[str, list[str]]
    progress: Progress = field(default_factory=Progress)
    lock: FileIO | None = None

    @property
    def sharded(self) -> bool:
        """Whether FSDP shards the model."""
        return unwrap(self.learner).sharded
