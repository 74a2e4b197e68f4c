"""Collectives; on one process each is the identity."""

import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather
from torch.distributed.rendezvous import rendezvous

from declip.errors import UserError
from declip.evaluation.encode import Share
from declip.models.device import pick_device
from declip.supervision.objective import Gather

T = TypeVar("T")

# The replacement that torch 2.13 names, all_gather_single, does not exist in torch 2.6.
warnings.filterwarnings(
    "ignore", r"torch\.distributed\.nn\.functional\.all_gather is deprecated", FutureWarning
)

RANK_TIMEOUT = 600.0  # seconds that a process waits for the others at a step before the run ends
# How long the other ranks wait while rank 0 evaluates, writes or reads
LONG_TIMEOUT = timedelta(hours=12)

# Numbers the process groups of this process: one that ended leaves its addresses in the store
JOINS = count()


def rank() -> int:
    """Rank of this process, 0 on one process."""
    if dist.is_initialized():
        return dist.get_rank()
    return 0


def is_rank_zero() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def world_size() -> int:
    """Number of processes that train together."""
    if dist.is_initialized():
        return dist.get_world_size()
    return 1


def launched() -> bool:
    """Whether torchrun (or another launcher that sets its variables) started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def init_distributed(name: str) -> "tuple[torch.device, HostGroup]":
    """Join torchrun's processes, if it started this one; return this rank's device and the coordination of ranks.

    Under torchrun the devices "auto" and "cuda" are "cuda:LOCAL_RANK". Groups use NCCL for CUDA, gloo otherwise.
    """
    if launched() and name in ("auto", "cuda") and torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        name = f"cuda:{local_rank % torch.cuda.device_count()}"
    device = pick_device(name)
    timeout = timedelta(seconds=RANK_TIMEOUT)
    if launched() and not dist.is_initialized():
        backend = "gloo"
        if device.type == "cuda":
            torch.cuda.set_device(device)
            backend = "nccl"
        store, own, ranks = next(rendezvous("env://", timeout=timeout))
        # torchrun keeps its store, with the addresses of dead processes, when it restarts them, so keys get a prefix.
        # With several machines each counts its restarts alone, and the store is new.
        one_machine = os.environ.get("GROUP_WORLD_SIZE", "1") == "1"
        attempt = "0"
        if one_machine:
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"declip/attempt/{attempt}/{next(JOINS)}", store)
        dist.init_process_group(backend, store=store, rank=own, world_size=ranks, timeout=timeout)
    return device, HostGroup()


def destroy_distributed() -> None:
    """End the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_rank(seed: int, step: int) -> None:
    """Seed torch's generators differently on each rank, so that no two ranks sample equal dropout masks."""
    torch.manual_seed(seed + 7919 * (rank() + 1) + step)


def gather(counts: Sequence[int]) -> Gather | None:
    """Return a function (counts[rank], k) → (sum(counts), k) that gathers rows in rank order; None on one process.

    The gradient of a row is summed over the ranks that used it.
    """

    def rows(own: Tensor) -> Tensor:
        # A collective needs equal shapes
        padding = own.new_zeros(max(counts) - len(own), *own.shape[1:])
        parts = all_gather(torch.cat([own, padding]))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    return rows if world_size() > 1 else None


@torch.no_grad()
def from_ranks(values: Tensor) -> Tensor:
    """Stack the values of all ranks, (W, …), without gradient; the shape must be equal on all ranks."""
    if world_size() == 1:
        return values.unsqueeze(0)
    parts = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(parts, values)
    return torch.stack(parts)


@torch.no_grad()
def sum_over_ranks(values: Tensor) -> Tensor:
    """Add up over ranks in place, without gradient."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


@torch.no_grad()
def average(values: Tensor) -> Tensor:
    """Average over ranks in place, without gradient."""
    return sum_over_ranks(values).div_(world_size())


@dataclass(frozen=True)
class StepSync:
    """The state of all ranks at a step."""

    rows: tuple[int, ...]  # number of pairs of each rank
    stop: bool  # whether any rank was asked to stop
    failed: bool = False  # whether any rank could not read its pairs
    notes: tuple[Any, ...] = ()  # messages of the ranks that had one, in rank order

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


class HostGroup(Share):
    """Coordination between ranks over gloo, so that it never waits for the GPU stream."""

    def __init__(self, timeout: float = RANK_TIMEOUT) -> None:
        self.timeout = timeout  # seconds to wait for a rank at a step
        self.alone = world_size() == 1
        if not self.alone:
            self.step_group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
            self.long_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)

    def sync_step(
        self, step: int, rows: int, stop: bool, note: Any = None, failed: bool = False
    ) -> StepSync:
        """Exchange the state of all ranks, see `StepSync`, before a step, counted from 0."""
        if self.alone:
            return StepSync((rows,), stop, failed, () if note is None else (note,))
        with self.explain_timeout(step):
            states = torch.zeros(world_size(), 4, dtype=torch.int64)
            states[rank()] = torch.tensor([rows, stop, failed, note is not None])
            dist.all_reduce(states, group=self.step_group)
            notes: list[Any] = [None] * world_size()
            if states[:, 3].any():  # a second collective, for broken pairs only
                dist.all_gather_object(notes, note, group=self.step_group)
        rows_of_ranks = tuple(states[:, 0].tolist())
        any_stop, any_failed = states[:, 1:3].any(dim=0).tolist()
        return StepSync(rows_of_ranks, any_stop, any_failed, tuple(filter(None, notes)))

    def on_rank_zero(self, action: Callable[[], T]) -> T:
        """Run an action on rank 0 while the others wait, and return its result on all.

        Rank 0 raises the action's `UserError`; the others exit quietly with the same status.
        """
        if self.alone:
            return action()
        answer: list[Any] = [None, False]
        try:
            if rank() == 0:
                answer[0] = action()
        except UserError:
            answer[1] = True
            raise
        finally:
            dist.broadcast_object_list(answer, src=0, group=self.long_group)
        if answer[1]:
            raise SystemExit(2)
        return cast(T, answer[0])

    def own(self, batches: Sequence[T]) -> Sequence[T]:
        """This rank's share of the batches, consecutive ones."""
        first = len(batches) * rank() // world_size()
        end = len(batches) * (rank() + 1) // world_size()
        return batches[first:end]

    def gather_parts(self, work: Callable[[], T]) -> list[T]:
        """Do this rank's part, and return the parts of all ranks in their order.

        The error of any rank is raised on rank 0; the others exit quietly with the same status.
        """
        done: T | None = None
        failure: UserError | None = None
        try:
            done = work()
        except UserError as error:
            failure = error
        answers = self.gather_objects((done, failure and str(failure)))
        errors = [error for _, error in answers if error is not None]
        if errors and is_rank_zero():
            raise failure or UserError(errors[0])
        if errors:
            raise SystemExit(2)
        return [part for part, _ in answers]

    def gather_objects(self, value: Any) -> list[Any]:
        """Gather every rank's value, in rank order."""
        values: list[Any] = [value] * world_size()
        if not self.alone:
            dist.all_gather_object(values, value, group=self.long_group)
        return values

    def gather_on_rank_zero(self, value: T) -> list[T]:
        """Gather every rank's value on rank 0, in rank order; the others get an empty list."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * world_size() if is_rank_zero() else []
        dist.gather_object(value, values or None, dst=0, group=self.long_group)
        return values

    @contextmanager
    def explain_timeout(self, step: int) -> Iterator[None]:
        """Replace torch's error of a collective by a `UserError` with the missing ranks; other errors pass."""
        try:
            yield
        except RuntimeError as error:
            # torch raises plain RuntimeError for some of gloo's and NCCL's errors.
            known = isinstance(error, dist.DistError) or re.search(
                "[gG]loo|NCCL|Timed out", str(error)
            )
            if self.alone or not known:
                raise
            missing = None  # as far as torch tells this rank
            try:
                dist.monitored_barrier(self.long_group, timedelta(seconds=2), wait_all_ranks=True)
            except RuntimeError as told:
                missing = re.search(r"Ranks ([\d, ]*\d)", str(told))
            other = "Another rank"
            if missing:
                other = f"Rank {missing[1]}"
            raise UserError(
                f"{other} did not reach step {step} within {self.timeout:g} s, or its process ended: the first error "
                "in the ranks' logs is the cause. Continue from the newest checkpoint with --resume."
            ) from error
