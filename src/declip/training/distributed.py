"""The only place with collectives; on one process each is the identity."""

import os
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
from torch.distributed.rendezvous import rendezvous

from declip.errors import UserError
from declip.supervision.objective import Gather, identity_gather

T = TypeVar("T")
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
"""The names since torch 2.13, or the earlier ones."""

PATIENT = timedelta(hours=12)
"""How long the other ranks wait while the first one measures, writes or reads: nothing there is a collective."""


def rank() -> int:
    """This process's number, 0 on one process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def launched() -> bool:
    """Whether torchrun (or another launcher that sets its variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def own_device(name: str) -> str:
    """The device that a rank takes of those on its machine: "auto" or "cuda" become "cuda:LOCAL_RANK"."""
    if not launched() or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"


def join(device: torch.device, patience: float) -> None:
    """Meet the other processes that torchrun started; nothing happens without it or when they have met.

    Args:
        device: What this rank computes on: NCCL for CUDA, gloo otherwise.
        patience: Seconds after which a collective that some rank does not come to ends the run.
    """
    if not launched() or dist.is_initialized():
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    wait = timedelta(seconds=patience)
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        dist.init_process_group(backend, timeout=wait)
        return
    # torchrun keeps its store when it starts processes again: addresses of dead ones would be found in it.
    store, own, ranks = next(rendezvous("env://", timeout=wait))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"declip/attempt/{attempt}", store)
    dist.init_process_group(backend, store=store, rank=own, world_size=ranks, timeout=wait)


def leave() -> None:
    """Part from the other processes."""
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
    """The gather of a step: the identity on one process.

    Args:
        counts: Rows of each rank; they need not be equal.

    Returns:
        A function (counts[rank], k) → (sum(counts), k), rows in rank order, with gradient.
    """
    return partial(_GatherRows.apply, counts=tuple(counts)) if world_size() > 1 else identity_gather


class _Sum(torch.autograd.Function):
    """Sum over ranks, of values and of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def summed(values: Tensor) -> Tensor:
    """The sum over ranks, with gradient; every rank must give the same shape."""
    return cast(Tensor, _Sum.apply(values)) if world_size() > 1 else values


@torch.no_grad()
def average(values: Tensor) -> Tensor:
    """The mean over ranks, without gradient, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


@dataclass(frozen=True)
class StepSync:
    """What all ranks brought to a step.

    Attributes:
        rows: Pairs of each rank.
        stop: Whether any rank was asked to stop.
        notes: What ranks had to tell, in rank order; most often nothing.
    """

    rows: tuple[int, ...]
    stop: bool
    notes: tuple[Any, ...] = ()

    @property
    def total(self) -> int:
        """Pairs of all ranks."""
        return sum(self.rows)

    @property
    def usable(self) -> bool:
        """Whether a step can be taken: batch norm needs two pairs, and every rank needs one."""
        return self.total >= 2 and min(self.rows) >= 1

    @property
    def offset(self) -> int:
        """Row of this rank's first pair among all."""
        return sum(self.rows[: rank()])

    @property
    def share(self) -> float:
        """Ranks times this rank's share of the pairs: the weight of its loss in the mean over ranks."""
        return self.rows[rank()] * len(self.rows) / self.total


def _of_a_collective(error: RuntimeError) -> bool:
    """Whether a collective failed, by gloo's and NCCL's words where torch gives no type of its own."""
    return isinstance(error, dist.DistError) or any(
        word in str(error) for word in ("gloo", "Gloo", "NCCL", "Timed out")
    )


class HostGroup:
    """What the ranks tell each other on the host, outside the device's queue of work: once a step, over gloo.

    A rank writes into the shared store which step it has come to before it waits for the others, so that when they do
    not come the ones that are missing can be named.

    Args:
        patience: Seconds that a rank is waited for at a step.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self._together = world_size() > 1
        if self._together:
            self._quick = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience))
            self._patient = dist.new_group(backend="gloo", timeout=PATIENT)
            self._store = dist.distributed_c10d._get_default_store()
            self._store.set(f"declip/who/{rank()}", f"on {socket.gethostname()}, process {os.getpid()}")

    def meet(self, step: int, rows: int, stop: bool, note: Any = None) -> StepSync:
        """Tell the others what this rank brings to a step, and hear what they bring.

        Args:
            step: The step that is to be taken.
            rows: This rank's pairs.
            stop: Whether this rank was asked to stop.
            note: Something that can be pickled, for all ranks; costs a second message when any rank has one.

        Raises:
            UserError: a rank did not come in time, or is gone; it is named.
        """
        if not self._together:
            return StepSync((rows,), stop, () if note is None else (note,))
        self._store.set(f"declip/step/{rank()}", str(step))
        with self.naming_the_missing(step):
            heard = torch.empty(world_size(), 3, dtype=torch.int64)
            own = torch.tensor([[rows, stop, note is not None]], dtype=torch.int64)
            _all_gather(heard, own, group=self._quick)
            notes: list[Any] = []
            if heard[:, 2].any():
                notes = [None] * world_size()
                dist.all_gather_object(notes, note, group=self._quick)
        told = tuple(each for each in notes if each is not None)
        return StepSync(tuple(heard[:, 0].tolist()), bool(heard[:, 1].any()), told)

    def first(self, action: Callable[[], T]) -> T:
        """Let the first rank do something while the others wait, and give its answer to all.

        Raises:
            UserError: the action's own; the first rank raises it, the others end quietly with the same status.
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

    def collect(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order."""
        values: list[Any] = [None] * world_size()
        if not self._together:
            return [value]
        dist.all_gather_object(values, value, group=self._patient)
        return values

    @contextmanager
    def naming_the_missing(self, step: int) -> Iterator[None]:
        """Turn the failure of a collective at a step into a message that names who is gone.

        Raises:
            UserError: instead of torch's error; any other error of a step passes.
        """
        try:
            yield
        except RuntimeError as error:
            if not self._together or not _of_a_collective(error):
                raise
            missing = [each for each in range(world_size()) if each != rank() and self._step_of(each) < step]
            if missing:
                named = "; ".join(
                    f"rank {each} {self._who(each)}, last at step {self._step_of(each)}" for each in missing
                )
                raise UserError(
                    f"Not all ranks came to step {step}; missing: {named}. A rank waits {self.patience:g} s for the "
                    "others (train.rank_timeout). The missing one hangs, or its process or machine is gone: look at "
                    "its log and at the disk it reads from. The run goes on from its newest checkpoint with --resume."
                ) from error
            raise UserError(
                f"Another rank is gone at step {step}: {str(error).splitlines()[0]} The first error in the ranks' logs "
                "says why. The run goes on from its newest checkpoint with --resume."
            ) from error

    def _step_of(self, number: int) -> int:
        return int(self._told(f"declip/step/{number}") or -1)

    def _who(self, number: int) -> str:
        return self._told(f"declip/who/{number}") or "that never joined"

    def _told(self, key: str) -> str | None:
        try:
            return self._store.get(key).decode() if self._store.check([key]) else None
        except RuntimeError:  # the store is gone with the first rank
            return None
