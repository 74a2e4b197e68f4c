"""Memory of a process by the kernel's count, on Linux."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def in_fresh_process(function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
    """Call a module's function in a new interpreter, with as many threads as here."""
    context = get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=threads) as pool:
        return pool.submit(function, *arguments, **keywords).result()


def added_peak(task: Callable[[], object]) -> int:
    """Return the largest growth of this process's memory during a task, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = resident()
    task()
    return peak() - before


def resident() -> int:
    """Return the resident memory of this process in bytes."""
    return _bytes("/proc/self/status", "VmRSS")


def peak() -> int:
    """Return the peak memory of this program in bytes; `ru_maxrss` would start at the size of its parent."""
    return _bytes("/proc/self/status", "VmHWM")


def _bytes(path: str, field: str) -> int:
    """Read a field of a kernel file; 0 if the system is not Linux."""
    lines = Path(path).read_text().splitlines() if Path(path).is_file() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)
