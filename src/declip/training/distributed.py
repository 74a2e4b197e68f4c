"""Collectives; on one process each is the identity."""

import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from declip.errors import UserError
from declip.supervision.objective import Gather, identity_gather

T = TypeVar("T")

RANK_TIMEOUT = 600.0
"""Seconds that a process waits for the others at a step before it gives up."""

JOINS = count()
"""Numbers the process groups of this process: one that ended leaves its addresses in the store."""

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


def join(device: torch.device, timeout: float = RANK_TIMEOUT) -> None:
    """Start the process group of torchrun's processes, NCCL for CUDA, gloo otherwise; without torchrun do nothing.

    A collective that some rank does not reach within `timeout` seconds ends the run.
    """
    if not launched() or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, own, ranks = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
    # torchrun keeps its store when it restarts processes, with the addresses of dead ones: hence a prefix. Of several
    # machines each counts its own restarts, and the store is new.
    one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if one_machine else "0"
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore(f"declip/attempt/{attempt}/{next(JOINS)}", store),
        rank=own,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )


def leave() -> None:
    """End the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


class _AllGather(torch.autograd.Function):
    """Tensors of all ranks, by rank; what is used on several ranks gets the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> tuple[Tensor, ...]:
        own = own.contiguous()
        parts = [torch.empty_like(own) for _ in range(world_size())]
        dist.all_gather(parts, own)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        received = torch.empty_like(sent := torch.stack(gradients))
        dist.all_to_all_single(received, sent)
        return received.sum(dim=0)


all_gather_with_gradient: Callable[[Tensor], tuple[Tensor, ...]] = _AllGather.apply


def gather(counts: Sequence[int]) -> Gather:
    """Give a function (counts[rank], k) → (sum(counts), k) that gathers rows in rank order.

    The gradient of a row is summed over the ranks that used it.
    """

    def rows(own: Tensor) -> Tensor:
        padding = own.new_zeros(max(counts) - len(own), *own.shape[1:])  # a collective needs equal shapes
        parts = all_gather_with_gradient(torch.cat([own, padding]))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    return rows if world_size() > 1 else identity_gather


def summed(values: Tensor) -> Tensor:
    """Sum over ranks, with gradient; every rank must give the same shape."""
    return torch.stack(all_gather_with_gradient(values)).sum(dim=0) if world_size() > 1 else values


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


class HostGroup:
    """Per-step coordination between ranks over gloo, so that it never waits for the GPU stream.

    Args:
        timeout: Seconds that a rank is waited for at a step.
    """

    def __init__(self, timeout: float = RANK_TIMEOUT) -> None:
        self.timeout = timeout
        self._together = world_size() > 1
        if self._together:
            self._quick = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self._patient = dist.new_group(backend="gloo", timeout=PATIENT)
            self._store = dist.distributed_c10d._get_default_store()

    def sync_step(self, step: int, rows: int, stop: bool, note: Any = None) -> StepSync:
        """Exchange the state of all ranks, see `StepSync`, before a step, counted from 0."""
        if not self._together:
            return StepSync((rows,), stop, () if note is None else (note,))
        self._store.set(f"declip/rank/{rank()}", f"{step} on {socket.gethostname()}, process {os.getpid()}")
        with self.name_missing_ranks(step):
            heard = torch.zeros(world_size(), 3, dtype=torch.int64)
            heard[rank()] = torch.tensor([rows, stop, note is not None])
            dist.all_reduce(heard, group=self._quick)
            notes: list[Any] = [None] * world_size()
            if heard[:, 2].any():  # a second collective, for broken pairs only
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
            # torch raises plain RuntimeError for some of gloo's and NCCL's errors.
            known = isinstance(error, dist.DistError) or re.search("[gG]loo|NCCL|Timed out", str(error))
            if not self._together or not known:
                raise
            raise UserError(
                f"Another rank is gone at step {step}: {self._missing(step) or str(error).splitlines()[0]}. It did "
                f"not come for {self.timeout:g} s, or its process or machine is gone: the first error in the "
                "ranks' logs says why. Continue from the newest checkpoint with --resume."
            ) from error

    def _missing(self, step: int) -> str:
        """List the ranks that did not come to a step, with the last one that each came to and where it runs."""
        missing = []
        with suppress(RuntimeError):  # the store is gone with the first rank
            for other in range(world_size()):
                key = f"declip/rank/{other}"
                last = self._store.get(key).decode() if self._store.check([key]) else "-1"
                if int(last.split()[0]) < step:
                    missing.append(f"rank {other}, last at step {last}")
        return "; ".join(missing)
