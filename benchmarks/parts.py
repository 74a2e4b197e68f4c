"""Model, optimizer and loader of a training step, built from a recipe as the trainer builds them."""

from dataclasses import dataclass

import torch

from declip.data.loader import PairLoader
from declip.data.pair import PairSource
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training.assemble import build_loader, plan_of
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.parallel import build_learner
from declip.training.step import StepParts


@dataclass
class Built:
    """A model ready to train, and the batches for it."""

    model: DualEncoder
    objective: Objective
    step: StepParts
    loader: PairLoader


def build(recipe: Recipe, source: PairSource, device: torch.device | str = "cpu") -> Built:
    """Build the parts with random weights and a filled queue."""
    torch.manual_seed(0)
    model = DualEncoder.from_recipe(recipe).to(device)
    objective = Objective(recipe, model).to(device)
    objective.prepare(source, model)
    if "nearest_neighbor" in objective.terms:
        queue = objective.terms["nearest_neighbor"].queue
        queue.push(torch.randn(queue.size, recipe.embed_dim, device=device))
    learner, plan, train = build_learner(recipe, model, objective).train(), plan_of(recipe), recipe.train
    optimizer = build_optimizer(named_trainable(model, objective), train)
    step = StepParts(learner, optimizer, plan, train)
    return Built(model, objective, step, build_loader(recipe, source, model))
