"""What a training step works on, built from a recipe as the trainer builds it."""

from dataclasses import dataclass

import torch

from declip.data.loader import PairLoader
from declip.data.pair import PairSource
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training.learner import Learner
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.setup import build_loader, image_views
from declip.training.step import StepParts


@dataclass
class Built:
    """A model ready to train, and the batches for it."""

    model: DualEncoder
    objective: Objective
    step: StepParts
    loader: PairLoader


def build(recipe: Recipe, source: PairSource, device: torch.device | str = "cpu") -> Built:
    """Build all with random weights; the queue is filled, as it is but for the first steps of a run."""
    torch.manual_seed(0)
    model = DualEncoder.from_recipe(recipe).to(device)
    objective = Objective(recipe, model).to(device)
    if recipe.train.channels_last:
        model.image_tower.to(memory_format=torch.channels_last)
    if objective.queue is not None:
        objective.queue.fill(torch.randn(objective.queue.size, recipe.embed_dim, device=device))
    learner, views, train = Learner(model, objective).train(), image_views(recipe), recipe.train
    optimizer = build_optimizer(named_trainable(model, objective), train)
    step = StepParts(learner, optimizer, views, None, train.grad_clip_norm, train.precision)
    return Built(model, objective, step, build_loader(recipe, source, model, views))
