"""The run or fit that a folder already holds; commands ask before they import torch."""

import os
from pathlib import Path
from typing import Any

from declip.data.pair import printable
from declip.data.sources.pair_list import LIST_KIND, read_pair_list
from declip.errors import UserError
from declip.io.outputs import check_folder
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe

RECIPE = "recipe.yaml"
# Of a fit: the two matrices, and in its metadata what they were fitted to
HEADS = "heads.safetensors"
# Lists of the parts that `declip finetune` splits its pairs into. They are written before the
# recipe, and may be left by a process that was killed in between.
SPLIT = ("train.pairs", "val.pairs")


def check_run_folder(folder: Path, resume: bool) -> None:
    """Refuse a folder with other files, and without `resume` also one with a run or a fit."""
    if os.path.isfile(folder / HEADS):
        if resume:
            return
        raise UserError(f"'{folder}' already holds a fit. Choose another --out.")
    check_folder(folder, RECIPE, SPLIT)
    if os.path.exists(folder / RECIPE) and not resume:
        raise existing_run(folder)


def existing_run(folder: Path) -> UserError:
    """Build the error for a run folder that is taken, with the pairs of its run."""
    pairs = read_recipe(folder).data.label
    # The list of a split, which is in the run folder
    if pairs.endswith(LIST_KIND) and Path(pairs).is_file():
        pairs = read_pair_list(Path(pairs)).source
    remedy = "Continue that run with --resume, or choose another --out for a new one."
    return UserError(f"'{folder}' already holds a run, on '{printable(pairs)}'. {remedy}")


def read_recipe(folder: Path) -> Recipe:
    """Read the resolved recipe of a run folder."""
    path = folder / RECIPE
    if not path.is_file():
        raise UserError(f"'{folder}' is not a run folder: it has no {RECIPE}.")
    try:
        return moved_lists(load_recipe(path), folder)
    except ValueError as error:
        raise UserError(
            f"'{folder}' is not a run of this version. {error} Choose another --out."
        ) from error


def moved_lists(recipe: Recipe, folder: Path) -> Recipe:
    """Find the lists of a run's split in its folder, if the folder was moved since its recipe was written."""

    def moved(name: str) -> str:
        here = folder / Path(name).name
        is_here = here.name in SPLIT and here.is_file()
        if is_here and not Path(name).exists():
            return str(here)
        return name

    changed: dict[str, Any] = {}
    for key, names in recipe.evaluation:
        if names:
            changed[f"evaluation.{key}"] = tuple(map(moved, names))
    if isinstance(recipe.data.source, str):
        changed["data.source"] = moved(recipe.data.source)
    return recipe.with_keys(changed)
