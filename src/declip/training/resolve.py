"""Resolve a recipe: from arguments of `declip.train`, then precision, sizes and epochs of a run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any

import torch

from declip.data.pair import PairSource
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from declip.interchange.weights import Weights
from declip.models.device import computes_bf16
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.runs.folder import RECIPE, log, read_recipe
from declip.training.distributed import HostGroup
from declip.training.pairs import has_captions, open_training_source
from declip.training.pretrained import load_pretrained


def resolve_recipe(
    recipe: str | Path | Recipe,
    overrides: Mapping[str, Any] | None = None,
    data: str | Path | None = None,
    val: str | Path | Sequence[str | Path] = (),
) -> Recipe:
    """Load a recipe with its overrides, training pairs and held-out sets, see `train`."""
    if isinstance(recipe, Recipe):
        if overrides or data is not None or val:
            raise UserError("overrides, data and val go with a recipe's name or file; this Recipe is resolved.")
        return recipe
    given = dict(overrides or {})
    if data is not None:
        given["data.source"] = json.dumps(str(data))  # quoted, because values are read as YAML
    val = several(val)
    if val:
        sets = {str(name): open_dataset(name).split("test") for name in val}
        classes = [name for name, source in sets.items() if source.labels is not None]
        captions = [name for name, source in sets.items() if has_captions(source)]
        if neither := [name for name in sets if name not in {*classes, *captions}]:
            raise UserError(f"'{neither[0]}' has neither classes nor captions, so it can't be a held-out set.")
        given |= {"evaluation.zero_shot": classes, "evaluation.retrieval": captions}
    return load_recipe(recipe, given)


def several(given: Any) -> list[Any]:
    """A list of what was given, also where that is one string, path or number, or None."""
    return [given] if isinstance(given, str | Path | Integral) else [] if given is None else list(given)


def held_out_sets(given: Any) -> list[Any]:
    """A list of held-out sets; a list of dicts or (image, caption) is one set."""
    one = isinstance(given, list | tuple) and any(isinstance(item, Mapping | tuple) for item in given)
    return list(given) if isinstance(given, list | tuple) and not one else [] if given is None else [given]


@dataclass(frozen=True)
class Resolved:
    """A recipe without open values, its pretrained weights and its training pairs."""

    recipe: Recipe
    weights: Weights | None
    source: PairSource


def resolve(recipe: Recipe, folder: Path, resume: bool, device: torch.device, hosts: HostGroup) -> Resolved:
    """Resolve a recipe; a resumed run keeps its precision and reads its weights from its folder."""
    recipe = hosts.on_rank_zero(partial(resolve_precision, recipe, device, folder, resume))
    weights = load_pretrained(recipe, folder, resume)
    if weights is not None:
        recipe = weights.fit(recipe)
    source = open_training_source(recipe)
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
    steps = max(1, round(train.epochs * max(1, len(source) // train.batch_size)))
    return recipe.model_copy(update={"train": train.model_copy(update={"steps": steps, "epochs": None})})
