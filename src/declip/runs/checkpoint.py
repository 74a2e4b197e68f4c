"""Checkpoints: everything that a run needs to go on bit for bit, written so that no crash can leave half of one.

A checkpoint is a folder ``step-00000500`` with two safetensors files (weights, and everything else that is a tensor)
and a JSON file, which holds their SHA-256 and its own. It is written beside and renamed. Nothing in it can run code
when it is read. `declip.training.checkpoint_writer` writes them while training goes on.
"""

import copy
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from declip.io.atomic import remove, save_tensors
from declip.errors import UserError

log = logging.getLogger("declip")

WEIGHTS, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"
NAME = re.compile(r"step-(\d{8,})")

KINDS: Mapping[str, type] = {"step": int, "recipe": str, "extra": dict, "sha256": dict}
"""What state.json holds; beside it stands its own "digest", which checkpoints of the first version lack."""

MOST_STATE = 64 << 20
"""Bytes. A longer state.json is none; real ones have a few thousand."""


@dataclass
class Checkpoint:
    """What is kept.

    Attributes:
        step: Number of steps done.
        weights: "model.…" (and "average.…") tensors: the towers; what `declip.load` reads.
        training: "objective.…", "optimizer.…" and "random.…" tensors: heads, queue, moments by parameter name, and the
            generators of each rank, "random.0.cpu" and so on.
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
    found = [path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def snapshot(checkpoint: Checkpoint, into: Checkpoint | None = None) -> Checkpoint:
    """Copy a checkpoint into host memory, bit for bit, each tensor into contiguous memory of its own.

    Args:
        checkpoint: Tensors on any devices; those of a CUDA device go to page-locked memory, with one wait for all.
        into: An earlier snapshot that is no longer needed; its memory is used again where names and shapes agree.

    Returns:
        The copy; nothing that happens to `checkpoint` changes it.
    """
    kept = Checkpoint(
        checkpoint.step,
        _host_copies(checkpoint.weights, into.weights if into else {}),
        _host_copies(checkpoint.training, into.training if into else {}),
        checkpoint.recipe,
        copy.deepcopy(checkpoint.extra),
    )
    tensors = (*checkpoint.weights.values(), *checkpoint.training.values())
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return kept


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and wait for it; see `write_snapshot`."""
    return write_snapshot(run, snapshot(checkpoint), keep)


def write_snapshot(run: Path, kept: Checkpoint, keep: int) -> Path:
    """Write a snapshot beside, flush it to the disk, read it back, rename it, and remove all but the newest `keep`.

    Checkpoints of later steps stay and do not count: the run went back before them because they are damaged.

    Args:
        run: The run folder.
        kept: What `snapshot` gave.
        keep: How many stay, at least 1.

    Raises:
        UserError: no space left or no permission, or the disk gives back something else; earlier checkpoints are
            untouched.
    """
    final = folder_of(run, kept.step)
    partial, aside = final.with_suffix(".partial"), final.with_suffix(".old.partial")
    try:
        for left in final.parent.glob("*.partial"):  # by a process that was killed
            remove(left)
        partial.mkdir(parents=True)
        save_tensors(kept.weights, partial / WEIGHTS)
        save_tensors(kept.training, partial / TRAINING)
        digests = {name: _digest(partial / name) for name in (WEIGHTS, TRAINING)}
        state = {"step": kept.step, "recipe": kept.recipe, "extra": kept.extra, "sha256": digests}
        (partial / STATE).write_text(_with_digest(state), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        _read_state(partial)
        _check(partial, digests)
        if final.exists():
            final.rename(aside)
        partial.rename(final)
        _flush(final.parent)
        _flush(run)
    except Exception as error:  # safetensors reports a full disk by an error class of its own
        shutil.rmtree(partial, ignore_errors=True)
        if aside.exists() and not final.exists():
            aside.rename(final)
        older = list_checkpoints(run)
        newest = f"The newest one there is {older[-1]}." if older else "There is no earlier one."
        raise UserError(
            f"Cannot write the checkpoint {final}: {str(error).rstrip('.')}. {newest} "
            "Make room or choose another folder with --out, then go on with --resume."
        ) from error
    remove(aside)
    older = [path for path in list_checkpoints(run) if _step(path) <= kept.step]
    for old in older[: -max(keep, 1)]:
        _remove_whole(old)
    return final


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check it against its checksums.

    Raises:
        UserError: not a checkpoint, or damaged: the file is named.
    """
    try:
        state = _read_state(folder)
        _check(folder, state["sha256"])
        return Checkpoint(
            step=state["step"],
            weights=load_file(folder / WEIGHTS),
            training=load_file(folder / TRAINING),
            recipe=state["recipe"],
            extra=state["extra"],
        )
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError, SafetensorError) as error:
        raise UserError(f"{folder} is not a whole checkpoint: {error or type(error).__name__}.") from error


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
    """The moments and step counts by parameter name; rates and decay come from the recipe."""
    names = _parameters(optimizer)
    state = {name: optimizer.state[parameter] for name, parameter in names.items() if parameter in optimizer.state}
    return {f"{name}.{moment}": tensor for name, values in state.items() for moment, tensor in values.items()}


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
    place: Callable[[Tensor, Tensor], Tensor] = lambda _, tensor: tensor,
) -> None:
    """Put the moments back.

    Args:
        optimizer: Its groups hold the "names" of their parameters, see `build_optimizer`.
        tensors: As `optimizer_tensors` gives them, whole; or by the parameter's number in the order of the groups, as
            the first version wrote them.
        place: Gives a moment the layout of its parameter.

    Raises:
        UserError: a moment belongs to no parameter, or has another shape than its parameter.
    """
    parameters = _parameters(optimizer)
    numbers = {name: number for number, name in enumerate(parameters)}
    by_number = {str(number): name for name, number in numbers.items()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, moment = key.rsplit(".", 1)
        name = by_number.get(name, name)
        parameter = parameters.get(name)
        shape = "nothing" if parameter is None else tuple(parameter.shape)
        if parameter is None or (moment != "step" and tensor.shape != parameter.shape):
            raise UserError(
                f"The checkpoint's moment '{key}' has shape {tuple(tensor.shape)}, and the optimizer has {shape} under "
                "that name: the checkpoint is of another model. Start a run in another folder with --out."
            )
        state.setdefault(numbers[name], {})[moment] = place(parameter, tensor)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameters(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters by name, in the order of the groups, by which torch counts them."""
    return {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }


def _host_copies(tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in host memory, of which those from a CUDA device may still be under way."""
    copies = {}
    for name, tensor in tensors.items():
        host = memory.get(name)
        if host is None or (host.shape, host.dtype) != (tensor.shape, tensor.dtype):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = host.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    return copies


def _with_digest(state: Mapping[str, Any]) -> str:
    """The text of state.json: its digest is that of the text without the digest."""
    digest = hashlib.sha256(json.dumps(state, indent=1).encode()).hexdigest()
    return json.dumps({**state, "digest": digest}, indent=1)


def _read_state(folder: Path) -> dict[str, Any]:
    """Read state.json; a file in which any byte changed is refused."""
    path = _plain_file(folder / STATE)
    if path.stat().st_size > MOST_STATE:
        raise UserError(f"The checkpoint file {path} is damaged: it is longer than {MOST_STATE:,} bytes.")
    text = path.read_bytes().decode("utf-8")
    state = json.loads(text)
    known = isinstance(state, dict) and state.keys() - {"digest"} == KINDS.keys()
    if not known or any(type(state[name]) is not kind for name, kind in KINDS.items()) or state["step"] < 0:
        raise UserError(f"The checkpoint file {path} is damaged: it does not hold {', '.join(KINDS)} and only these.")
    if "digest" in state and text != _with_digest({name: state[name] for name in KINDS}):
        raise UserError(f"The checkpoint file {path} is damaged: its checksum does not match.")
    return state


def _check(folder: Path, digests: Mapping[str, Any]) -> None:
    """Compare both files of tensors with their digests."""
    if digests.keys() != {WEIGHTS, TRAINING}:
        raise UserError(f"The checkpoint file {folder / STATE} is damaged: it has not one checksum for each file.")
    for name, expected in digests.items():
        if _digest(_plain_file(folder / name)) != expected:
            raise UserError(f"The checkpoint file {folder / name} is damaged: its checksum does not match.")


def _plain_file(path: Path) -> Path:
    """Refuse what is no file: a pipe or a device would be read for ever."""
    if not path.is_file():
        raise UserError(f"{path.parent} is not a whole checkpoint: there is no file {path.name}.")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_whole(folder: Path) -> None:
    """Remove a checkpoint so that a crash in the middle leaves no part of one under its name."""
    aside = folder.with_suffix(".partial")
    try:
        folder.rename(aside)
    except OSError as error:
        log.warning("The old checkpoint %s cannot be removed: %s", folder, error.strerror)
    remove(aside)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _flush(path: Path) -> None:
    """Wait until it is on the disk; what reads a file next reads it from there, where the system can be told so."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
