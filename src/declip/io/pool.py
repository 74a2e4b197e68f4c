"""Work on many pairs in several processes: parts in order, whatever process does them, with a progress bar."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.data import DataLoader, Dataset

from declip.errors import UserError
from declip.io.progress import progress_bar

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
        The parts' results, in order. Wrap the loop in `naming_lost_workers`.
    """
    workers = min(workers, count)
    loader: DataLoader = DataLoader(
        parts,
        batch_size=None,
        sampler=range(count),
        num_workers=workers,
        collate_fn=_as_it_is,  # torch would turn arrays into tensors
        worker_init_fn=leave_signals_to_main,
        generator=torch.Generator(),
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    return iter(loader)


def pairs_bar(shown: bool, unit: str = "pairs") -> Progress:
    """Progress on standard error that counts pairs, or other things."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(unit), TimeRemainingColumn())
    return progress_bar(*columns, shown=shown)


@contextmanager
def naming_lost_workers(where: str = "") -> Iterator[None]:
    """Turn the error of a worker process that was killed into a message with the usual cause and the remedy.

    torch raises it from its handler of SIGCHLD, so anywhere in the main process: all that runs while workers live
    belongs inside, not only the loader's `next`.

    Raises:
        UserError: instead of torch's error; any other error passes.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Traceback" in str(error):
            raise
        raise UserError(
            f"A process that loads data was lost{where}: {error} Most often memory, or shared memory, ran out. Use "
            "fewer workers (0 loads in the main process) or a smaller batch."
        ) from error


def leave_signals_to_main(_: int) -> None:
    """Ignore the signals that stop a run in a worker: the main process gets them too and still needs its batches.

    SIGTERM counts when the main process itself sends it: that is how Python ends workers when it exits.
    """
    for each in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(each, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS lacks it, and does not say who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_asked_by, args=(os.getppid(),), daemon=True).start()


def _end_when_asked_by(main: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)


def _as_it_is(found: Any) -> Any:
    return found


class _Speed(ProgressColumn):
    """Pairs, or other things, a second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {self._unit}/s" if task.speed else "")
