"""Checkpoints with everything to resume a run bit-exactly, written atomically."""

import copy
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from declip.errors import UserError, newer
from declip.io.atomic import flush, remove, save_tensors, sha256

log = logging.getLogger("declip")

WEIGHTS, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"
# links to the newest checkpoint and to the best one, if the file system has links
LAST = "last"
BEST = "best"
NAME = re.compile(r"step-(\d{8,})")
# Keys and types of state.json; "digest" is the checksum of the other keys
KINDS = {"step": int, "recipe": str, "extra": dict, "sha256": dict, "digest": str}
LAYOUT = 1  # of state.json, which has no key "layout" before this number is raised
MAX_STATE = 64 << 20  # largest size of state.json in bytes; usual ones have a few thousand


@dataclass
class Checkpoint:
    """State of a run after a step, saved as two safetensors files and a JSON file; reading it runs no code."""

    step: int
    weights: dict[str, Tensor]  # "model.…", which `declip.load` reads
    # "objective.…", "optimizer.…", "random.RANK.…": heads, moments by name, generators
    training: dict[str, Tensor]
    recipe: str  # resolved, as YAML
    # Versions, counts of skipped pairs, the best evaluation
    extra: dict[str, Any] = field(default_factory=dict)


def folder_of(run: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob("step-*")
    complete = [path for path in folders if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(complete, key=step_of)


def step_of(folder: Path) -> int:
    """Step of a checkpoint by its path."""
    return int(folder.name.removeprefix("step-"))


def snapshot(checkpoint: Checkpoint) -> Checkpoint:
    """Copy a checkpoint into host memory, with contiguous tensors."""
    # From a CUDA device into pinned memory, asynchronously, so it is synchronized once.
    to_host: Any = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}

    def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: tensor.detach().to(non_blocking=tensor.is_cuda, **to_host)
            for name, tensor in tensors.items()
        }

    weights = copied(checkpoint.weights)
    training = copied(checkpoint.training)
    for device in {tensor.device for tensor in checkpoint.weights.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)
    extra = copy.deepcopy(checkpoint.extra)
    return replace(checkpoint, weights=weights, training=training, extra=extra)


def write_snapshot(run: Path, kept: Checkpoint, keep: int) -> Path:
    """Write a checkpoint to a temporary folder, flush it, read it back, rename it, and keep the newest `keep`.

    The best one is kept too. If writing fails, earlier checkpoints are unchanged.
    """
    final = folder_of(run, kept.step)
    best = best_of(run, kept)
    partial = final.with_suffix(".partial")
    try:
        for left in final.parent.glob("*.partial"):  # of a process that was killed
            remove(left)
        _write_files(kept, partial)
        _read_state(partial)
        # --- rename, then move the links to it
        remove(final)  # it is damaged: the run would have resumed from it otherwise
        partial.rename(final)
        for name, target in {LAST: final, BEST: best}.items():
            if target is not None:
                with suppress(OSError):
                    link = final.with_name(f"{name}.partial")
                    link.symlink_to(target.name)
                    link.replace(final.with_name(name))
        flush(final.parent)
        flush(run)
    except Exception as error:  # safetensors has its own error class for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        older = list_checkpoints(run)  # untouched
        newest = (
            f"The newest checkpoint is {older[-1]}." if older else "There is no earlier checkpoint."
        )
        raise UserError(
            f"Cannot write the checkpoint {final}: {str(error).rstrip('.')}. {newest} Make room, then use --resume."
        ) from error
    # --- those of later steps are not counted: they are damaged, so that the run resumed before them
    older = [path for path in list_checkpoints(run) if step_of(path) <= kept.step and path != best]
    for old in older[:-keep]:
        # Renamed first, so that a crash leaves no incomplete checkpoint
        aside = old.with_suffix(".partial")
        with suppress(OSError):
            old.rename(aside)
        remove(aside)
    return final


def _write_files(kept: Checkpoint, folder: Path) -> None:
    folder.mkdir(parents=True)
    save_tensors(kept.weights, folder / WEIGHTS)
    save_tensors(kept.training, folder / TRAINING)
    digests = {name: sha256(folder / name) for name in (WEIGHTS, TRAINING)}
    state = {"step": kept.step, "recipe": kept.recipe, "extra": kept.extra, "sha256": digests}
    (folder / STATE).write_text(_with_digest(state), encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        flush(path)


def best_of(run: Path, checkpoint: Checkpoint) -> Path | None:
    """Path of the best checkpoint up to another one, if the run tracks it; see `train.patience`."""
    best = checkpoint.extra.get("best")
    if not best:
        return None
    return folder_of(run, best["step"])


class CheckpointWriter:
    """Writes checkpoints in a thread, one at a time, so that training waits for a copy in memory, not for the disk."""

    def __init__(self, run: Path, keep: int) -> None:
        self._run = run
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[Path] | None = None

    def write(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint into host memory and start writing it, after the previous one is written."""
        self.wait()
        self._pending = self._thread.submit(
            write_snapshot, self._run, snapshot(checkpoint), self._keep
        )

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk; raises once if it could not be written."""
        pending = self._pending
        self._pending = None
        if pending is not None:
            pending.result()

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.wait()
        except UserError as failed:
            if error is None:
                raise
            log.error("%s", failed)  # the error that ended the block is raised
        finally:
            self._thread.shutdown()


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify its checksums; raises `UserError` with the damaged file."""
    try:
        state = _read_state(folder)
        weights = load_file(folder / WEIGHTS)
        training = load_file(folder / TRAINING)
        return Checkpoint(state["step"], weights, training, state["recipe"], state["extra"])
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError, SafetensorError) as error:
        raise UserError(
            f"{folder} is not a complete checkpoint: {error or type(error).__name__}."
        ) from error


def newest_good(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Find the newest undamaged checkpoint, and the problems of newer ones."""
    problems: list[str] = []
    for folder in reversed(list_checkpoints(run)):
        try:
            return load_checkpoint(folder), problems
        except UserError as error:
            problems.append(str(error))
    return None, problems


def load_best(run: Path) -> Checkpoint:
    """Read the best checkpoint of a run, else its newest undamaged one."""
    newest, problems = newest_good(run)
    if newest is None:
        raise UserError(f"No checkpoint in '{run}' is complete. {problems[0]}")
    # The best one may be damaged, or have been removed when a better one was saved that is damaged now.
    chosen = newest
    best = best_of(run, newest)
    try:
        if best is not None and best != folder_of(run, newest.step):
            chosen = load_checkpoint(best)
    except UserError as error:
        problems.append(str(error))
    for problem in problems:
        log.warning("%s Reading step %d instead.", problem, chosen.step)
    return chosen


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add a prefix to every name."""
    return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}


def without_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose names start with a prefix, by names without it."""
    start = f"{prefix}."
    return {
        name.removeprefix(start): tensor
        for name, tensor in tensors.items()
        if name.startswith(start)
    }


def _with_digest(state: Mapping[str, Any]) -> str:
    """Serialize the state; its digest is that of the text without the digest."""
    text = json.dumps(state, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps({**state, "digest": digest}, indent=1)


def _read_state(folder: Path) -> dict[str, Any]:
    """Read state.json and verify the checksums of all files."""
    for name in (STATE, WEIGHTS, TRAINING):
        if not (folder / name).is_file():  # a pipe or a device would block
            raise UserError(f"{folder} is not a complete checkpoint: {name} is missing.")
    path = folder / STATE
    text = "null"
    if path.stat().st_size <= MAX_STATE:
        text = path.read_bytes().decode("utf-8")
    state = json.loads(text)
    if isinstance(state, dict) and state.get("layout", LAYOUT) != LAYOUT:
        raise newer(path)
    good = (
        isinstance(state, dict)
        and {name: type(value) for name, value in state.items()} == KINDS
        and state["step"] >= 0
        and state["sha256"].keys() == {WEIGHTS, TRAINING}
        and text == _with_digest({name: value for name, value in state.items() if name != "digest"})
    )
    damaged = [STATE]
    if good:
        digests = state["sha256"]
        damaged = [name for name in digests if sha256(folder / name) != digests[name]]
    if damaged:
        raise UserError(
            f"The checkpoint file {folder / damaged[0]} is damaged: its checksum does not match."
        )
    return dict(state)
