"""Collectives; on one process each is the identity."""

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_reduce as all_reduce_with_gradient
from torch.distributed.rendezvous import rendezvous

from declip.errors import UserError
from declip.supervision.objective import Gather, identity_gather

T = TypeVar("T")
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""The names since torch 2.13, or the earlier ones."""

PATIENT = timedelta(hours=12)
"""How long the other ranks wait while rank 0 evaluates, writes or reads."""


def rank() -> int:
    """Rank of this process, 0 on one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_rank_zero() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched() -> bool:
    """Whether torchrun (or another launcher that sets its variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def own_device(name: str) -> str:
    """Name the device of a rank: "auto" or "cuda" become "cuda:LOCAL_RANK" under torchrun."""
    if not launched() or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def join(device: torch.device, timeout: float) -> None:
    """Start the process group of torchrun's processes, NCCL for CUDA, gloo otherwise; without torchrun do nothing.

    A collective that some rank does not reach within `timeout` seconds ends the run.
    """
    if not launched() or dist.is_initialized():
        return
    backend, wait = "gloo", timedelta(seconds=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "nccl"
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        dist.init_process_group(backend, timeout=wait)
        return
    # torchrun keeps its store when it restarts processes, with the addresses of dead ones: hence a prefix.
    store, own, ranks = next(rendezvous("env://", timeout=wait))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"declip/attempt/{attempt}", store)
    dist.init_process_group(backend, store=store, rank=own, world_size=ranks, timeout=wait)


def leave() -> None:
    """End the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order; the gradient of a row is summed over the ranks that used it."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: tuple[int, ...]) -> Tensor:
        """(B, k) → (N, k), B = counts[rank], N = sum(counts)."""
        ctx.counts, most = counts, max(counts)
        gathered = own.new_empty(len(counts) * most, *own.shape[1:])
        _all_gather(gathered, _padded(own, most))
        if min(counts) == most:
            return gathered
        return torch.cat([part[:n] for part, n in zip(gathered.split(most), counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """(N, k) → (B, k): sum over ranks, each keeping its own rows."""
        counts, most = ctx.counts, max(ctx.counts)
        parts = [_padded(part, most) for part in gradients[0].split(list(counts))]
        own = torch.empty_like(parts[0])
        _reduce_scatter(own, torch.cat(parts))
        return own[: counts[dist.get_rank()]], None


def _padded(rows: Tensor, count: int) -> Tensor:
    if len(rows) == count:
        return rows.contiguous()
    return torch.cat([rows, rows.new_zeros(count - len(rows), *rows.shape[1:])])


def gather(counts: Sequence[int]) -> Gather:
    """Give a function (counts[rank], k) → (sum(counts), k) that gathers rows in rank order, with gradient."""
    return partial(_GatherRows.apply, counts=tuple(counts)) if world_size() > 1 else identity_gather


def summed(values: Tensor) -> Tensor:
    """Sum over ranks, with gradient; every rank must give the same shape."""
    return cast(Tensor, all_reduce_with_gradient(values)) if world_size() > 1 else values


@torch.no_grad()
def average(values: Tensor) -> Tensor:
    """Average over ranks in place, without gradient."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


@dataclass(frozen=True)
class StepSync:
    """The state of all ranks at a step.

    Attributes:
        rows: Number of pairs of each rank.
        stop: Whether any rank was asked to stop.
        notes: Messages of the ranks that had one, in rank order.
    """

    rows: tuple[int, ...]
    stop: bool
    notes: tuple[Any, ...] = ()

    @property
    def total(self) -> int:
        """Number of pairs of all ranks."""
        return sum(self.rows)

    @property
    def usable(self) -> bool:
        """Whether a step is possible: batch norm needs two pairs, and every rank needs one."""
        return self.total >= 2 and min(self.rows) >= 1

    @property
    def offset(self) -> int:
        """Row of this rank's first pair among all."""
        return sum(self.rows[: rank()])

    @property
    def weight(self) -> float:
        """Weight of this rank's loss in the mean over ranks: its fraction of the pairs times the number of ranks."""
        return self.rows[rank()] * len(self.rows) / self.total


def _is_collective_error(error: RuntimeError) -> bool:
    # torch raises plain RuntimeError for some of gloo's and NCCL's errors.
    return isinstance(error, dist.DistError) or re.search("[gG]loo|NCCL|Timed out", str(error)) is not None


class HostGroup:
    """Per-step coordination between ranks over gloo, so that it never waits for the GPU stream.

    A rank writes the step that it has reached into the shared store before it waits for the others, so that missing
    ranks can be named.

    Args:
        timeout: Seconds that a rank is waited for at a step.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._together = world_size() > 1
        if self._together:
            self._quick = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._patient = dist.new_group(backend="gloo", timeout=PATIENT)
            self._store = dist.distributed_c10d._get_default_store()
            self._store.set(f"declip/who/{rank()}", f"on {socket.gethostname()}, process {os.getpid()}")

    def sync_step(self, step: int, rows: int, stop: bool, note: Any = None) -> StepSync:
        """Exchange the state of all ranks before a step.

        Args:
            step: Counted from 0.
            rows, stop, note: See `StepSync`; a second collective is needed when any rank has a note.

        Raises:
            UserError: a rank did not come in time, or is gone; it is named.
        """
        if not self._together:
            return StepSync((rows,), stop, () if note is None else (note,))
        self._store.set(f"declip/step/{rank()}", str(step))
        with self.name_missing_ranks(step):
            heard = torch.empty(world_size(), 3, dtype=torch.int64)
            _all_gather(heard, torch.tensor([[rows, int(stop), int(note is not None)]]), group=self._quick)
            notes: list[Any] = [None] * world_size()
            if heard[:, 2].any():
                dist.all_gather_object(notes, note, group=self._quick)
        given = tuple(item for item in notes if item is not None)
        return StepSync(tuple(heard[:, 0].tolist()), bool(heard[:, 1].any()), given)

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0 while the others wait, and give its result to all.

        Raises:
            UserError: the action's own; rank 0 raises it, the others exit quietly with the same status.
        """
        if not self._together:
            return action()
        answer: list[Any] = [None, False]
        try:
            if rank() == 0:
                answer[0] = action()
        except UserError:
            answer[1] = True
            raise
        finally:
            dist.broadcast_object_list(answer, src=0, group=self._patient)
        if answer[1]:
            raise SystemExit(2)
        return cast(T, answer[0])

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather every rank's value, in rank order."""
        values: list[Any] = [value] * world_size()
        if self._together:
            dist.all_gather_object(values, value, group=self._patient)
        return values

    @contextmanager
    def name_missing_ranks(self, step: int) -> Iterator[None]:
        """Replace torch's error of a collective by a `UserError` that names the missing ranks; other errors pass."""
        try:
            yield
        except RuntimeError as error:
            if not self._together or not _is_collective_error(error):
                raise
            missing = [
                f"rank {other} {self._read(f'declip/who/{other}') or 'that never joined'}, last at step {reached}"
                for other in range(world_size())
                if (reached := int(self._read(f"declip/step/{other}") or -1)) < step and other != rank()
            ]
            if missing:
                raise UserError(
                    f"Not all ranks reached step {step}; missing: {'; '.join(missing)}. A rank waits "
                    f"{self.timeout:g} s for the others (train.rank_timeout). The missing one hangs, or its process or "
                    "machine is gone: look at its log and at the disk it reads from. Continue from the newest "
                    "checkpoint with --resume."
                ) from error
            raise UserError(
                f"Another rank is gone at step {step}: {str(error).splitlines()[0]} The first error in the ranks' logs "
                "says why. Continue from the newest checkpoint with --resume."
            ) from error

    def _read(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:  # the store is gone with the first rank
            return None
