"""Resolve what a recipe leaves open: precision by the device, sizes by the pretrained weights, epochs by the pairs."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from declip.data.pair import PairSource
from declip.interchange.weights import Weights
from declip.models.device import computes_bf16
from declip.recipe.schema import Recipe
from declip.runs.folder import RECIPE, log, read_recipe
from declip.training.distributed import HostGroup
from declip.training.pairs import open_training_source
from declip.training.pretrained import load_pretrained


@dataclass(frozen=True)
class Resolved:
    """A recipe without open values, its pretrained weights and its training pairs."""

    recipe: Recipe
    weights: Weights | None
    source: PairSource


def resolve(
    recipe: Recipe, folder: Path, resume: bool, device: torch.device, hosts: HostGroup, source: PairSource | None = None
) -> Resolved:
    """Resolve a recipe; a resumed run keeps its precision and reads its weights from its folder."""
    recipe = hosts.on_rank_zero(partial(resolve_precision, recipe, device, folder, resume))
    weights = load_pretrained(recipe, folder, resume)
    if weights is not None:
        recipe = weights.fit(recipe)
    source = open_training_source(recipe, source)
    return Resolved(resolve_epochs(recipe, source), weights, source)


def resolve_precision(recipe: Recipe, device: torch.device, folder: Path, resume: bool) -> Recipe:
    """Replace train.precision=auto by the device's; a resumed run continues with that of its recipe."""
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if computes_bf16(device) else "fp32"
        if resume and (folder / RECIPE).is_file():
            precision = read_recipe(folder).train.precision
    if precision == "bf16" and not computes_bf16(device):
        log.warning("%s does not support bfloat16 natively: steps are slow. Set train.precision=auto.", device)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def resolve_epochs(recipe: Recipe, source: PairSource) -> Recipe:
    """Replace train.epochs by the number of steps: epochs of complete batches."""
    train = recipe.train
    if train.epochs is None:
        return recipe
    pairs = sum(span.shown for span in source.spans())
    steps = max(1, round(train.epochs * max(1, pairs // train.batch_size)))
    return recipe.model_copy(update={"train": train.model_copy(update={"steps": steps, "epochs": None})})
