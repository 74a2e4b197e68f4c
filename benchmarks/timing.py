"""Timing on a shared machine: the compared tasks take turns in one process; rows of results as a table."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

from rich.console import Console
from rich.table import Table


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


def take_turns(repeats: int, tasks: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Run the tasks as `time_turns` does and return the median seconds of each."""
    return medians(time_turns(repeats, tasks))


def medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    """Return the median of each task."""
    return {name: statistics.median(seconds) for name, seconds in taken.items()}


def row(part: str, what: str, seconds: float, count: int, unit: str, **more: object) -> dict[str, object]:
    """Build a row of a measurement: `seconds` for `count` of `unit`."""
    each = {"microseconds_each": round(1e6 * seconds / count, 2), "per_second": round(count / seconds, 1)}
    return {"part": part, "what": what, "count": count, "unit": unit, **each, **more}


def show(rows: Sequence[Mapping[str, object]], hidden: Sequence[str] = ()) -> None:
    """Print rows as a table on standard error; a column for each key that has a value."""
    columns = dict.fromkeys(key for found in rows for key, value in found.items() if value is not None)
    table = Table(*(shown := [key for key in columns if key not in hidden]))
    for found in rows:
        table.add_row(*("" if found.get(key) is None else str(found[key]) for key in shown))
    console = Console(stderr=True)
    (console if console.is_terminal else Console(stderr=True, width=160)).print(table)
