"""Checks during a run: steps that are not finite, losses that do not fall, a loader that is too slow."""

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

FLAT_AFTER = 300  # steps after which a contrastive loss still at chance level is worth a warning
STARVED = 0.25  # fraction of time spent waiting for batches above which a warning is due
LEAST_STEPS, LEAST_SECONDS = 20, 5.0  # before a verdict about the loader
WARM = 3  # steps after a start of the workers that do not count, because their queue is empty
MOST_WORKERS = 8


class NonFiniteGuard:
    """Finds the first step whose loss or gradient is not finite, without waiting for the device at every one."""

    def __init__(self, device: torch.device) -> None:
        self._first = torch.tensor(-1, device=device)

    def check(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Record on the device whether a step, counted from 0, is the first bad one; no wait."""
        good = torch.isfinite(values["loss"]) & torch.isfinite(values["grad_norm"])
        self._first = torch.where((self._first < 0) & ~good, step, self._first)

    @property
    def first(self) -> int | None:
        """The first bad step; a wait for the device."""
        return None if (found := int(self._first)) < 0 else found


class LossMonitor:
    """Finds a problem in the logged losses of a run and warns of it once; `watched` is `Objective.watched`."""

    def __init__(self, batch_size: int, warmup_steps: int, watched: str | None) -> None:
        self.watched, self.batch_size, self.warmup_steps = watched, batch_size, warmup_steps
        self.chance, self._lowest = math.log(batch_size), math.inf

    def check(self, step: int, losses: Mapping[str, float]) -> str | None:
        """Return the warning that is due after a number of steps, if any."""
        loss = losses.get(self.watched or "")
        if loss is None or not math.isfinite(loss):  # `NonFiniteGuard` handles those that are not finite
            return None
        # Pretrained weights may begin far above chance: only a rise above the lowest loss so far counts.
        self._lowest = min(self._lowest, loss)
        warning = None
        if step >= FLAT_AFTER and abs(loss - self.chance) < 0.02:
            warning = (
                f"After {step} steps the {self.watched} loss is still at chance level, ln({self.batch_size}) = "
                f"{self.chance:.2f}. Usual causes: too high a learning rate, captions that do not belong to the "
                "images, or one caption for all. Try a tenth of train.lr, and declip data inspect."
            )
        elif step > self.warmup_steps and loss > max(self.chance, self._lowest) + 1:
            warning = (
                f"At step {step} the {self.watched} loss is {loss:.2f}, after {self._lowest:.2f}; chance level is "
                f"{self.chance:.2f}: the run diverges. Usual cause: too high a learning rate. Try half of "
                "train.lr, a longer train.warmup_steps, or train.grad_clip_norm=1.0."
            )
        if warning is not None:
            self.watched = None  # no second warning
        return warning


class ThroughputMonitor:
    """Warns once when steps wait for the loader for much of their time."""

    def __init__(self) -> None:
        self._steps, self._waited, self._total = -WARM, 0.0, 0.0

    def check(self, waited: float, took: float, workers: int) -> str | None:
        """Count a step by its seconds of waiting and computing; return the warning that is due, if any."""
        self._steps += 1
        if self._steps > 0:
            self._waited, self._total = self._waited + waited, self._total + waited + took
        if self._steps < LEAST_STEPS or self._total < LEAST_SECONDS:
            return None
        fraction = self._waited / self._total
        self._steps, self._waited, self._total = 0, 0.0, 0.0
        if fraction < STARVED:
            return None
        self._total = -math.inf  # no second warning
        return (
            f"Steps wait {fraction:.0%} of their time for batches. More loader processes (data.workers={workers} now; "
            "results stay the same) or smaller images (declip data shard) help, where processors are free."
        )


def auto_workers(training: int) -> int:
    """Number of loader processes: this rank's share of the machine's processors, minus the `training` threads."""
    return max(0, min(MOST_WORKERS, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - training))


def cores() -> int:
    """Number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
