"""A stopwatch for the parts of a step."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch.profiler import record_function

Span = Callable[[str], AbstractContextManager[None]]
"""Gives a context whose time belongs to the named part of a step."""


def untimed(name: str) -> AbstractContextManager[None]:
    """Time nothing: what training does."""
    return nullcontext()


class Clock:
    """Adds up the time of named parts; a part inside another one is not counted twice. Waits for the device.

    Args:
        device: What is waited for at both ends of a part, so that its work is counted where it was asked for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}
        """By name, in the order in which the parts first ended."""
        self._inside = [0.0]

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Time what happens inside, and name it in a trace."""
        start = self._now()
        self._inside.append(0.0)
        try:
            with record_function(f"declip: {name}"):
                yield
        finally:
            taken = self._now() - start
            inner = self._inside.pop()
            self._inside[-1] += taken
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - inner

    def forget(self) -> None:
        """Begin anew: what came before was warming up."""
        self.seconds.clear()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
