"""An ordered map over worker processes, with a progress bar."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.data import DataLoader, Dataset

from declip.errors import UserError
from declip.io.progress import progress_bar

T = TypeVar("T")

MAX_WORKERS = 8  # default limit of worker processes; with more the disk is the bottleneck
POLL_SECONDS = 5.0  # interval at which a worker checks that the main process is alive


def usual_workers() -> int:
    """Default number of worker processes: one per core, at most `MAX_WORKERS`."""
    return min(cores(), MAX_WORKERS)


def cores() -> int:
    """Number of processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Compute with a number of torch's threads, also in threads that start meanwhile; then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parallel_map(
    work: Callable[[Any], T],
    parts: Sequence[Any],
    workers: int | None,
    title: str,
    pin_memory: bool = False,
) -> Iterator[T]:
    """Apply `work` to parts of several pairs, in order, with a bar if titled; None workers: the usual ones."""
    if workers is None:
        workers = 0
        if len(parts) > 1:
            workers = usual_workers()
    # The workers start before the thread of the bar does: a fork copies no thread.
    stream = imap(work, parts, min(workers, len(parts)), pin_memory)

    def results() -> Iterator[T]:
        with naming_lost_workers(), pairs_bar(bool(title)) as bar:
            task = bar.add_task(title, total=sum(map(len, parts)))
            for part, result in zip(parts, stream, strict=True):
                yield result
                bar.advance(task, len(part))

    return results()


class _Arguments(Dataset):
    def __getitem__(self, given: Any) -> Any:
        return given


def imap(
    work: Callable[[Any], T], given: Iterable[Any], workers: int, pin_memory: bool = False
) -> Iterator[T]:
    """Apply `work` to arguments in worker processes, or in this one with 0 workers, and yield the results in order.

    The call forks the processes, so make it before threads start, and wrap the loop in `naming_lost_workers`.
    """
    loader: DataLoader = DataLoader(
        _Arguments(),
        batch_size=None,
        sampler=given,
        num_workers=workers,
        collate_fn=work,
        pin_memory=pin_memory,
        worker_init_fn=partial(leave_signals_to_main, os.getpid()),
        generator=torch.Generator(),  # otherwise the loader would advance torch's global generator
        # Forked workers share the memory of the source, start immediately, and need no `if __name__ == "__main__"` in
        # a script. Forking is safe here: workers use one thread each and no accelerator.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
    )
    # Forked workers inherit that, also in threads that libraries start in each new process
    with _sigterm_blocked():
        return iter(loader)


@contextmanager
def _sigterm_blocked() -> Iterator[None]:
    """Block SIGTERM in this thread; one that is sent meanwhile arrives afterwards."""
    # On macOS and Windows workers do not wait for it, see below
    if not hasattr(signal, "sigtimedwait"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def pairs_bar(progress: bool) -> Progress:
    """Progress bar on standard error that counts pairs or other units."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    return progress_bar(*columns, progress=progress)


@contextmanager
def naming_lost_workers(where: str = "") -> Iterator[None]:
    """Convert the error of a killed worker process, which torch may raise anywhere meanwhile, to a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "Traceback" in str(error):
            raise
        remedy = "Use fewer workers (0: load in the main process) or a smaller batch: memory may be short."
        raise UserError(f"A worker process was killed{where}: {error} {remedy}") from error


def leave_signals_to_main(main: int, _: int) -> None:
    """Ignore signals that stop a run in a worker: the main process receives them too and still needs its batches.

    SIGTERM is obeyed if the main process sent it, as Python does at exit. If that was killed, the worker exits.
    """
    for name in ("SIGINT", "SIGUSR1"):  # Windows has no SIGUSR1
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS, which does not tell the sender of a signal
        threading.Thread(target=_exit_on_request_of, args=(main,), daemon=True).start()


def _exit_on_request_of(main: int) -> None:
    sent = None
    while os.getppid() == main and (sent is None or sent.si_pid != main):
        sent = signal.sigtimedwait({signal.SIGTERM}, POLL_SECONDS)
    os._exit(0)
