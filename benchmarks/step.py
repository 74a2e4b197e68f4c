"""A training step of demo size, and how much of it goes into loading the batch."""

from collections.abc import Callable

import torch

from declip.config import load_recipe
from declip.data.pairs import PairSource
from declip.models.dual_encoder import DualEncoder
from declip.supervision.objective import Objective
from declip.training.build import build_loader, image_views
from declip.training.optimizer import build_optimizer, named_trainable
from declip.training.parallel import Learner
from declip.training.step import StepParts, training_step
from pairs import open_pairs
from timing import row, take_turns

RECIPES = ("clip", "declip")


def tasks_of(name: str, source: PairSource) -> tuple[int, dict[str, Callable[[], object]]]:
    """The batch of a recipe, and its two tasks: load the next batch in this process, and train on it."""
    recipe = load_recipe(name, {"data.workers": 0})
    torch.manual_seed(0)
    model = DualEncoder.from_recipe(recipe)
    objective = Objective.for_model(recipe, model)
    optimizer = build_optimizer(named_trainable(model, objective), recipe.train)
    views = image_views(recipe)
    parts = StepParts(Learner(model, objective), optimizer, views, None, recipe.train.clip_norm, recipe.train.precision)
    loader = build_loader(recipe, source, model, views)
    batch = [next(loader)]

    def load() -> None:
        batch[0] = next(loader)

    return recipe.train.batch, {f"{name}: load": load, f"{name}: train": lambda: training_step(parts, batch[0])}


def measure(repeats: int) -> list[dict[str, object]]:
    """Load and train take turns, and the recipes too: clip, declip, clip, declip …

    Loading is reading, cropping and tokenising; the views' colours are done on the batch and belong to the step.
    """
    source, batches = open_pairs(), {}
    tasks: dict[str, Callable[[], object]] = {}
    for name in RECIPES:
        batches[name], of_this = tasks_of(name, source)
        tasks |= of_this
    seconds = take_turns(repeats, tasks)
    whole = {name: seconds[f"{name}: load"] + seconds[f"{name}: train"] for name in RECIPES}
    rows = []
    for name in RECIPES:
        share = round(seconds[f"{name}: load"] / whole[name], 3)
        more = {"pairs": source.name, "threads": torch.get_num_threads(), "loading_share": share}
        rows.append(row("step", f"recipe {name}", whole[name], batches[name], "pairs", **more))
        rows[-1]["seconds_a_step"] = round(whole[name], 4)
    rows[-1]["times_clip"] = round(whole["declip"] / whole["clip"], 2)
    return rows
