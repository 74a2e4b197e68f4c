"""Checkpoints: everything that a run needs to resume bit-exactly, written so that no crash can leave half of one.

A checkpoint is a folder ``step-00000500`` with two safetensors files (weights, and all other tensors) and a JSON file,
which holds their SHA-256 and its own. It is written under another name and renamed; ``last`` leads to the newest.
Nothing in it can run code when it is read. `CheckpointWriter` writes in a thread while training continues.
"""

import copy
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from declip.errors import UserError
from declip.io.atomic import remove, save_tensors, sha256

log = logging.getLogger("declip")
Where = TypeVar("Where", str, Path)

WEIGHTS, TRAINING, STATE, LAST = "model.safetensors", "training.safetensors", "state.json", "last"
NAME = re.compile(r"step-(\d{8,})")

KINDS: Mapping[str, type] = {"step": int, "recipe": str, "extra": dict, "sha256": dict, "digest": str}
"""Keys of state.json; "digest" is the checksum of the others."""

MOST_STATE = 64 << 20
"""Bytes. A longer state.json is refused; real ones have a few thousand."""

OLD_LAYOUT = (
    "It was written by an earlier version of declip with other recipe keys and tensor names. Train anew, or export it "
    "with that version (declip export RUN --to safetensors) and start from the file with finetune.pretrained."
)


@dataclass
class Checkpoint:
    """The state of a run after a step.

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


def is_old_layout(recipe: str) -> bool:
    """Whether a recipe's text has the keys of the versions before loss_weights."""
    return re.search(r"^weights:", recipe, re.MULTILINE) is not None


def folder_of(run: Path, step: int) -> Path:
    """Path of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def step_of(folder: Path) -> int:
    """Step of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def snapshot(checkpoint: Checkpoint, into: Checkpoint | None = None) -> Checkpoint:
    """Copy a checkpoint into host memory, each tensor into contiguous memory of its own.

    Args:
        checkpoint: Tensors on any devices; those of a CUDA device go to page-locked memory, with one wait for all.
        into: An earlier snapshot that is no longer needed; its memory is used again where names and shapes agree.
    """
    weights = _host_copies(checkpoint.weights, into.weights if into else {})
    training = _host_copies(checkpoint.training, into.training if into else {})
    kept = replace(checkpoint, weights=weights, training=training, extra=copy.deepcopy(checkpoint.extra))
    tensors = (*checkpoint.weights.values(), *checkpoint.training.values())
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return kept


def save_checkpoint(run: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write a checkpoint and wait for it; see `write_snapshot`."""
    return write_snapshot(run, snapshot(checkpoint), keep)


def write_snapshot(run: Path, kept: Checkpoint, keep: int) -> Path:
    """Write a snapshot under another name, flush it, read it back, rename it, and remove all but the newest `keep`.

    Checkpoints of later steps stay and do not count: the run went back before them because they are damaged.

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
        digests = {name: sha256(partial / name) for name in (WEIGHTS, TRAINING)}
        state = {"step": kept.step, "recipe": kept.recipe, "extra": kept.extra, "sha256": digests}
        (partial / STATE).write_text(_with_digest(state), encoding="utf-8")
        for path in [*partial.iterdir(), partial]:
            _flush(path)
        _check(partial, _read_state(partial)["sha256"])
        if final.exists():
            final.rename(aside)
        partial.rename(final)
        _point_to(final)
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
            "Make room or choose another folder with --out, then continue with --resume."
        ) from error
    remove(aside)
    older = [path for path in list_checkpoints(run) if step_of(path) <= kept.step]
    for old in older[: -max(keep, 1)]:
        _remove_whole(old)
    return final


class CheckpointWriter:
    """Writes checkpoints in a thread, so that training waits for a copy in memory and not for the disk.

    At most one write is under way. One copy of the checkpoint stays in host memory and is used again each time.
    Writing and hashing release Python's global lock. Python waits for the thread before it exits, so that a normal end
    loses nothing.
    """

    def __init__(self, run: Path, keep: int) -> None:
        self._run, self._keep = run, keep
        self._memory: Checkpoint | None = None
        self._thread: Thread | None = None
        self._failed: Exception | None = None

    def write(self, checkpoint: Checkpoint) -> None:
        """Copy a checkpoint into host memory and start to write it, after the one before is written.

        Raises:
            UserError: the one before could not be written; the new one is not written then.
        """
        self.wait()
        self._memory = snapshot(checkpoint, self._memory)
        self._thread = Thread(target=self._save, args=(self._memory,), name=f"checkpoint {checkpoint.step}")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            UserError: it could not be written; see `write_snapshot`. It is raised once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._failed is not None:
            failed, self._failed = self._failed, None
            raise failed

    def close(self) -> None:
        """Wait for the disk and free the memory; another `write` may follow."""
        try:
            self.wait()
        finally:
            self._memory = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except UserError as failed:
            if error is None:
                raise
            log.error("%s", failed)  # the error that ended the block matters more

    def _save(self, kept: Checkpoint) -> None:
        try:
            write_snapshot(self._run, kept, self._keep)
        except Exception as error:  # the training thread raises it
            self._failed = error


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint, or ``checkpoints/last``, and check it against its checksums.

    Raises:
        UserError: not a checkpoint, or damaged: the file is named; or of an earlier version.
    """
    folder = resolve_last(folder)
    try:
        state = _read_state(folder)
        if is_old_layout(state["recipe"]):
            raise UserError(f"The checkpoint {folder} cannot be read. {OLD_LAYOUT}")
        _check(folder, state["sha256"])
        weights, training = load_file(folder / WEIGHTS), load_file(folder / TRAINING)
        return Checkpoint(state["step"], weights, training, state["recipe"], state["extra"])
    except UserError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError, SafetensorError) as error:
        raise UserError(f"{folder} is not a complete checkpoint: {error or type(error).__name__}.") from error


def resolve_last(where: Where) -> Where:
    """Follow a pointer file ``checkpoints/last`` to the checkpoint that it names; other paths and names stay."""
    path = Path(where)
    if path.name != LAST or not path.is_file() or path.stat().st_size > 100:
        return where
    name = path.read_text(encoding="utf-8", errors="replace").strip()
    return type(where)(path.parent / name) if NAME.fullmatch(name) else where


def _point_to(checkpoint: Path) -> None:
    """Let ``last`` lead to a checkpoint: a relative link, or a file with its name where links are not possible."""
    partial = checkpoint.with_name(f"{LAST}.partial")
    with suppress(OSError):  # the checkpoint itself is complete
        partial.unlink(missing_ok=True)
        try:
            partial.symlink_to(checkpoint.name)
        except OSError:
            partial.write_text(checkpoint.name, encoding="utf-8")
        partial.replace(checkpoint.with_name(LAST))


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


def _host_copies(tensors: Mapping[str, Tensor], memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copy to host memory; copies from a CUDA device may still be under way."""
    copies = {}
    for name, tensor in tensors.items():
        host = memory.get(name)
        if host is None or (host.shape, host.dtype) != (tensor.shape, tensor.dtype):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = host.copy_(tensor.detach(), non_blocking=tensor.is_cuda)
    return copies


def _with_digest(state: Mapping[str, Any]) -> str:
    """Word state.json; its digest is that of the text without the digest."""
    digest = hashlib.sha256(json.dumps(state, indent=1).encode()).hexdigest()
    return json.dumps({**state, "digest": digest}, indent=1)


def _read_state(folder: Path) -> dict[str, Any]:
    """Read state.json; a file in which any byte changed is refused."""
    path = _plain_file(folder / STATE)
    if path.stat().st_size > MOST_STATE:
        raise UserError(f"The checkpoint file {path} is damaged: it is longer than {MOST_STATE:,} bytes.")
    text = path.read_bytes().decode("utf-8")
    state = json.loads(text)
    known = isinstance(state, dict) and state.keys() == KINDS.keys()
    if not known or any(type(state[name]) is not kind for name, kind in KINDS.items()) or state["step"] < 0:
        raise UserError(f"The checkpoint file {path} is damaged: it does not hold {', '.join(KINDS)} and only these.")
    if text != _with_digest({name: state[name] for name in KINDS if name != "digest"}):
        raise UserError(f"The checkpoint file {path} is damaged: its checksum does not match.")
    return state


def _check(folder: Path, digests: Mapping[str, Any]) -> None:
    if digests.keys() != {WEIGHTS, TRAINING}:
        raise UserError(f"The checkpoint file {folder / STATE} is damaged: it has not one checksum for each file.")
    for name, expected in digests.items():
        if sha256(_plain_file(folder / name)) != expected:
            raise UserError(f"The checkpoint file {folder / name} is damaged: its checksum does not match.")


def _plain_file(path: Path) -> Path:
    """Refuse a pipe or a device: reading it would not end."""
    if not path.is_file():
        raise UserError(f"{path.parent} is not a complete checkpoint: there is no file {path.name}.")
    return path


def _remove_whole(folder: Path) -> None:
    """Remove a checkpoint so that a crash in the middle leaves no part of one under its name."""
    aside = folder.with_suffix(".partial")
    try:
        folder.rename(aside)
    except OSError as error:
        log.warning("The old checkpoint %s cannot be removed: %s", folder, error.strerror)
    remove(aside)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk, and drop it from the page cache: it is next read from the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
