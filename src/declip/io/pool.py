"""Work on many pairs in several processes: parts in order, whatever process does them, with a progress bar."""

import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.data import DataLoader, Dataset

from declip.errors import UserError

MOST_WORKERS = 8
"""Processes that are started unless more are asked for: beyond this the disk is the limit."""


def usual_workers() -> int:
    """One process for each core, `MOST_WORKERS` at most."""
    return min(os.cpu_count() or 1, MOST_WORKERS)


def in_order(parts: Dataset, count: int, workers: int) -> Iterator[Any]:
    """Start the work on parts 0 to count - 1; the processes are forked here, so call it before threads start.

    Args:
        parts: `parts[i]` does part i and returns what can be pickled.
        count: How many there are.
        workers: Processes; 0 does the work in this one, as it is asked for.

    Yields:
        The parts' results, in order.

    Raises:
        UserError: While iterating, when a process was lost.
    """
    workers = min(workers, count)
    loader: DataLoader = DataLoader(
        parts,
        batch_size=None,
        sampler=range(count),
        num_workers=workers,
        collate_fn=_as_it_is,  # torch would turn arrays into tensors
        worker_init_fn=_leave_interrupts_to_the_main_process,
        generator=torch.Generator(),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    return _watched(iter(loader))


def pairs_bar(shown: bool, unit: str = "pairs") -> Progress:
    """A progress bar on the error stream that counts pairs, or other things."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(unit), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


def _watched(stream: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from stream
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Traceback" in str(error):
            raise
        raise UserError(
            f"A process that reads pairs was lost: {error} Most often memory ran out. Use fewer workers (0 reads in "
            "this process)."
        ) from error


def _leave_interrupts_to_the_main_process(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _as_it_is(found: Any) -> Any:
    return found


class _Speed(ProgressColumn):
    """Pairs, or other things, a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {self._unit}/s" if task.speed else "")
