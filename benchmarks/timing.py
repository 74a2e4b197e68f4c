"""Timing on a shared machine: compared tasks take turns in one process; the machine, and rows of results as a table."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

PACKAGES = (
    "torch", "torchvision", "timm", "numpy", "pillow", "tokenizers", "open_clip_torch", "simplejpeg", "faiss-cpu",
    "sentence-transformers",
)  # fmt: skip
"""Packages whose versions are recorded."""


def machine() -> dict[str, object]:
    """Return date, processor, threads, load and versions."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": dict(package_versions()),
    }


@cache
def package_versions() -> tuple[tuple[str, str], ...]:
    """Names and versions of the installed `PACKAGES`; reading all metadata takes half a second."""
    installed = {found.name: found.version for found in distributions()}
    return tuple((name, installed[name]) for name in installed if name in PACKAGES)


def device_name(device: torch.device) -> str:
    """Return the accelerator's name, or cpu."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def processor() -> str:
    """Return the processor's name on Linux, else its architecture."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def time_turns(repeats: int, tasks: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Run the tasks A B A B … and return all seconds of each, in order.

    What slows the machine for a while then slows all tasks. A first round, which fills caches, is not counted.
    """
    taken: dict[str, list[float]] = {name: [] for name in tasks}
    for turn in range(repeats + 1):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            if turn:
                taken[name].append(time.perf_counter() - start)
    return taken


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each task."""
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def row(
    part: str, what: str, seconds: float, count: int, unit: str, **more: object
) -> dict[str, object]:
    """Build a row of a measurement: `seconds` for `count` of `unit`."""
    each = {
        "microseconds_each": round(1e6 * seconds / count, 2),
        "per_second": round(count / seconds, 1),
    }
    return {"part": part, "what": what, "count": count, "unit": unit, **each, **more}


def show(rows: Sequence[Mapping[str, object]], hidden: Sequence[str] = ()) -> None:
    """Print rows as a table on standard error; a column for each key that has a value."""
    columns = dict.fromkeys(
        key for found in rows for key, value in found.items() if value is not None
    )
    table = Table(*(shown := [key for key in columns if key not in hidden]))
    for found in rows:
        table.add_row(*("" if found.get(key) is None else str(found[key]) for key in shown))
    console = Console(stderr=True)
    (console if console.is_terminal else Console(stderr=True, width=160)).print(table)
