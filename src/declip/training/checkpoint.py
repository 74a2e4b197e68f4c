"""Checkpoints: everything that a run needs to go on bit for bit, written so that no crash can leave half of one.

A checkpoint is a folder ``step-00000500`` with two safetensors files (weights, and everything else that is a tensor)
and a JSON file. It is written beside and renamed. Nothing in it can run code when it is read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from declip.errors import UserError

WEIGHTS, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"


@dataclass
class Checkpoint:
    """What is kept.

    Attributes:
        step: Number of steps done.
        weights: "model.…" (and "average.…") tensors: the towers; what `declip.load` reads.
        training: "objective.…", "optimizer.…" and "random.…" tensors: heads, queue, moments, generators.
        recipe: The resolved recipe as YAML.
        extra: JSON values: versions, counts of skipped pairs.
    """

    step: int
    weights: dict[str, Tensor]
    training: dict[str, Tensor]
    recipe: str
    extra: dict[str, Any] = field(default_factory=dict)


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.suffix != ".partial")


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint beside, flush it to the disk, rename it, and remove all but the newest `keep`.

    Raises:
        UserError: no space left or no permission; earlier checkpoints are untouched.
    """
    final = folder_of(run, checkpoint.step)
    partial = final.with_suffix(".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_storable(checkpoint.weights), partial / WEIGHTS)
        save_file(_storable(checkpoint.training), partial / TRAINING)
        state = {
            "step": checkpoint.step,
            "recipe": checkpoint.recipe,
            "extra": checkpoint.extra,
            "sha256": {name: _digest(partial / name) for name in (WEIGHTS, TRAINING)},
        }
        (partial / STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(final.parent)
    except Exception as error:  # safetensors reports a full disk by an error class of its own
        shutil.rmtree(partial, ignore_errors=True)
        older = list_checkpoints(run)
        kept = f"The last good one is {older[-1]}." if older else "There is no earlier one."
        raise UserError(
            f"Cannot write the checkpoint {final}: {error}. {kept} "
            "Make room or choose another folder with --out, then go on with --resume."
        ) from error
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check it against its checksums.

    Raises:
        UserError: not a checkpoint, or damaged: the file is named.
    """
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for name, expected in state["sha256"].items():
            if _digest(folder / name) != expected:
                raise UserError(f"The checkpoint file {folder / name} is damaged: its checksum does not match.")
        return Checkpoint(
            step=int(state["step"]),
            weights=load_file(folder / WEIGHTS),
            training=load_file(folder / TRAINING),
            recipe=state["recipe"],
            extra=state["extra"],
        )
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise UserError(f"{folder} is not a whole checkpoint: {error}.") from error


def newest_good(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that reads well, and what was wrong with the newer ones."""
    problems: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        try:
            return load_checkpoint(folder), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put a prefix before every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def part(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors below a prefix, without it."""
    start = f"{prefix}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The moments and step counts, named by parameter number; rates and decay come from the recipe."""
    state = optimizer.state_dict()["state"]
    return {f"{number}.{name}": value for number, values in state.items() for name, value in values.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put the moments back."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Own, contiguous memory on the CPU for each tensor, as safetensors demands."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
