"""Resolve what a recipe leaves open: precision by the device, sizes by the pretrained weights, epochs by the pairs."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from declip.data.columns import Columns
from declip.data.pair import PairSource
from declip.data.sources.mixture import Mixture
from declip.data.sources.open import open_source
from declip.data.sources.splits import training_part
from declip.data.sources.subset import take
from declip.errors import UserError
from declip.interchange.weights import Weights
from declip.models.device import computes_bf16
from declip.recipe.schema import Recipe
from declip.runs.folder import RECIPE, log, read_recipe
from declip.training.distributed import HostGroup
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
    """Replace train.precision=auto by the device's; a resumed run keeps its own, on any device."""
    precision = recipe.train.precision
    if precision == "auto":
        precision = "bf16" if computes_bf16(device) else "fp32"
        if resume and (folder / RECIPE).is_file():
            precision = read_recipe(folder).train.precision
    if precision == "bf16" and not computes_bf16(device):
        log.warning("%s does not support bfloat16 natively: steps are slow. Set train.precision=auto.", device)
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"precision": precision})})


def open_training_source(recipe: Recipe, given: PairSource | None = None) -> PairSource:
    """Open the training pairs, one source or a mixture, or the one given, limited to `data.max_pairs` by the seed.

    Of a source with splits these are the pairs of its split "train".
    """
    data = recipe.data
    columns = Columns.of(data)
    source: PairSource
    if isinstance(data.source, str):
        source = training_part(given or open_source(data.source, columns))
    else:
        source = Mixture([(training_part(open_source(part.source, columns)), part.weight) for part in data.source])
    if data.columns.get("group") is not None and source.group_column is None:
        raise UserError(
            f"data.columns.group names a column of a table, and '{source.name}' is not a table. Leave it out."
        )
    if data.max_pairs is None:
        return source
    limit = source.take if isinstance(source, Mixture) else partial(take, source)
    return limit(data.max_pairs, recipe.seed)


def resolve_epochs(recipe: Recipe, source: PairSource) -> Recipe:
    """Replace train.epochs by the number of steps: epochs of complete batches."""
    train = recipe.train
    if train.epochs is None:
        return recipe
    pairs = sum(span.shown for span in source.spans())
    steps = max(1, round(train.epochs * max(1, pairs // train.batch_size)))
    return recipe.model_copy(update={"train": train.model_copy(update={"steps": steps, "epochs": None})})
