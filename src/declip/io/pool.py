"""An ordered map over worker processes, with a progress bar."""

import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.data import DataLoader, Dataset

from declip.errors import UserError
from declip.io.progress import progress_bar

MOST_WORKERS = 8  # default limit of worker processes: beyond this the disk is the bottleneck


def usual_workers() -> int:
    """One process per core, `MOST_WORKERS` at most."""
    return min(os.cpu_count() or 1, MOST_WORKERS)


def in_order(parts: Dataset, count: int, workers: int | None) -> Iterator[Any]:
    """Compute `parts[0]` to `parts[count - 1]` as `computed` does, by default in `usual_workers`."""
    return computed(parts, range(count), min(usual_workers() if workers is None else workers, count))


def computed(parts: Dataset, numbers: Iterable[int], workers: int, pin_memory: bool = False) -> Iterator[Any]:
    """Compute the parts of these numbers in worker processes and yield the results in order.

    The processes are forked by this call, so make it before threads start, and wrap the loop in `naming_lost_workers`.
    With 0 workers each part is computed in this process, when it is asked for.
    """
    loader: DataLoader = DataLoader(
        parts,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        collate_fn=_unchanged,  # torch would turn arrays into tensors
        pin_memory=pin_memory,
        worker_init_fn=partial(leave_signals_to_main, os.getpid()),
        generator=torch.Generator(),  # without its own the loader would advance torch's global one
        # Forked workers share the source's memory, start at once, and need no `if __name__ == "__main__"` in a user's
        # script. It is safe here: they use one thread each, and never touch an accelerator.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    return iter(loader)


def pairs_bar(shown: bool, unit: str = "pairs") -> Progress:
    """Progress on standard error that counts pairs, or other things."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Speed(unit), TimeRemainingColumn())
    return progress_bar(*columns, shown=shown)


@contextmanager
def naming_lost_workers(where: str = "") -> Iterator[None]:
    """Turn the error of a killed worker process into a `UserError` with the usual cause and the remedy.

    torch raises it from its handler of SIGCHLD, so anywhere in the main process: all code that runs while workers live
    belongs inside, not only the loader's `next`.
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


LOOKS = 5.0  # seconds between a worker's looks whether the main process is still there


def leave_signals_to_main(main: int, _: int) -> None:
    """Ignore the signals that stop a run in a worker: the main process gets them too and still needs its batches.

    SIGTERM counts when the main process itself sends it: that is how Python ends workers when it exits. Where the main
    process was killed the worker ends itself: writing to a full pipe, it would wait for ever.
    """
    for name in ("SIGINT", "SIGUSR1"):  # Windows has no SIGUSR1
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # macOS lacks it, and does not say who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_request_of, args=(main,), daemon=True).start()


def _exit_on_request_of(main: int) -> None:
    sent = None
    while os.getppid() == main and (sent is None or sent.si_pid != main):
        sent = signal.sigtimedwait({signal.SIGTERM}, LOOKS)
    os._exit(0)


def _unchanged(result: Any) -> Any:
    return result


class _Speed(ProgressColumn):
    """Pairs, or other things, per second."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:,.0f} {self._unit}/s" if task.speed else "")
