"""Weights of runs and of their checkpoints."""

from dataclasses import replace
from pathlib import Path

from declip.errors import UserError
from declip.interchange.weights import Weights, read_recipe, read_tensors
from declip.runs.checkpoint import (
    STATE,
    list_checkpoints,
    load_best,
    load_checkpoint,
    without_prefix,
)
from declip.runs.folder import MIXED, RECIPE


def matches(where: str) -> bool:
    """Whether a path exists; other formats are tried before this one."""
    return Path(where).expanduser().exists()


def read(where: str) -> Weights:
    """Read a checkpoint or a run, see `read_checkpoint`."""
    return read_checkpoint(Path(where).expanduser()).check()


def has_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint, or a run with one."""
    return (path / STATE).is_file() or bool(list_checkpoints(path))


def read_checkpoint(path: Path, mixed: bool = True) -> Weights:
    """Read a checkpoint or the best one of a run, else its newest undamaged one; `mixed`: with its mixture.

    The weights are not checked.
    """
    if not has_checkpoint(path):
        is_run = (path / RECIPE).is_file()
        problem = "has no checkpoint yet" if is_run else f"is not a run folder: it has no {RECIPE}"
        raise UserError(
            f"'{path}' {problem}. Give a run folder, one in its checkpoints, or a folder of another format."
        )
    if (path / STATE).is_file():
        chosen = load_checkpoint(path)
    else:
        chosen = load_best(path)
        mixture = path / MIXED
        if mixed and mixture.is_file():
            chosen = replace(chosen, weights=read_tensors(mixture))
    return Weights(
        recipe=read_recipe(chosen.recipe, str(path)),
        tensors=without_prefix("model", chosen.weights),
        origin=str(path),
        heads=without_prefix("objective", chosen.training),
        step=chosen.step,
    )
