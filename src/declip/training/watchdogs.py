"""Watchdogs of a run: steps that are not finite, losses that do not fall, and a loader that is too slow."""

import math
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from declip.runs.folder import log

FLAT_AFTER = 300
"""Steps after which a contrastive loss still at chance level is worth a warning."""
STEEP = 50.0
"""A gradient norm that many times the usual one is a spike."""

STARVED = 0.25
"""Fraction of the time spent waiting for batches from which a warning is due."""
LEAST_STEPS, LEAST_SECONDS = 20, 5.0
"""Measurements before a verdict about the loader."""
WARM = 3
"""Steps after a start of the workers that do not count: their queue is empty then."""
MOST_WORKERS = 8
"""More are seldom needed, and each takes memory."""


class NonFiniteGuard:
    """Finds steps whose loss or gradient is not finite, without waiting for the device at every one.

    Args:
        allowed: Number of such steps that may be skipped, `train.max_nonfinite_steps`.
        device: Device of the losses.

    Attributes:
        skipped: The steps that were skipped, counted from 0; saved with a checkpoint.
    """

    def __init__(self, allowed: int, device: torch.device) -> None:
        self.allowed, self.skipped = allowed, list[int]()
        self._first = torch.tensor(-1, device=device)

    def check(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Keep the first bad step on the device, where asking for it would be a wait."""
        good = torch.isfinite(values["loss"]) & torch.isfinite(values["grad_norm"])
        if self.allowed and not good:
            self.skipped.append(step)
            log.warning(
                f"The loss is not finite at step {step + 1}: {shown(values)}. The step is skipped and changes nothing; "
                f"{len(self.skipped)} of at most {self.allowed} (train.max_nonfinite_steps)."
            )
            good = torch.tensor(len(self.skipped) <= self.allowed)
        self._first = torch.where((self._first < 0) & ~good, step, self._first)

    @property
    def first(self) -> int | None:
        """The first bad step that was not skipped; waits for the device."""
        return None if (found := int(self._first)) < 0 else found


def shown(values: Mapping[str, Tensor]) -> str:
    """Word losses with their values, for a message."""
    return ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())


class LossMonitor:
    """Finds problems in the logged numbers of a run and warns of each once, of some only after the warm-up."""

    def __init__(self, batch_size: int, warmup_steps: int) -> None:
        self.chance, self.batch_size, self.warmup_steps = math.log(batch_size), batch_size, warmup_steps
        self._warned: set[str] = set()
        self._usual_norm: float | None = None
        self._lowest = math.inf

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Give the new warnings after a number of steps, from the losses by name and "grad_norm"."""
        warnings: dict[str, str] = {}
        loss, norm = values.get("contrastive", values.get("late_interaction")), values.get("grad_norm")
        # `NonFiniteGuard` handles values that are not finite; kept here, they would silence every later warning.
        if loss is not None and math.isfinite(loss):
            # Pretrained weights may begin far above chance: only a rise above the lowest loss so far counts.
            self._lowest = min(self._lowest, loss)
            if step >= FLAT_AFTER and abs(loss - self.chance) < 0.02:
                warnings["flat"] = (
                    f"After {step} steps the contrastive loss is still at chance level, ln({self.batch_size}) = "
                    f"{self.chance:.2f}. Usual causes: too high a learning rate, captions that do not belong to the "
                    "images, or one caption for all. Try a tenth of train.lr, and declip data inspect."
                )
            elif step > self.warmup_steps and loss > max(self.chance, self._lowest) + 1:
                warnings["worse"] = (
                    f"At step {step} the contrastive loss is {loss:.2f}, after {self._lowest:.2f}; chance level is "
                    f"{self.chance:.2f}: the run diverges. Usual cause: too high a learning rate. Try half of "
                    "train.lr, a longer train.warmup_steps, or train.grad_clip_norm=1.0."
                )
        if norm is not None and math.isfinite(norm):
            usual = norm if self._usual_norm is None else self._usual_norm
            self._usual_norm = 0.9 * usual + 0.1 * min(norm, 2 * usual)
            if step > self.warmup_steps and norm > STEEP * usual:
                warnings["spike"] = (
                    f"At step {step} the gradient norm is {norm:.3g}, usually {usual:.3g}: a spike. If the loss does "
                    "not recover, try train.grad_clip_norm=1.0 or a lower train.lr from the last checkpoint on."
                )
        new = {name: text for name, text in warnings.items() if name not in self._warned}
        self._warned |= new.keys()
        return list(new.values())


class ThroughputMonitor:
    """Warns once when steps wait for the loader for much of their time."""

    def __init__(self) -> None:
        self._steps, self._waited, self._total, self._warned = -WARM, 0.0, 0.0, False

    def check(self, waited: float, took: float, workers: int) -> str | None:
        """Count a step, which waited for its batch and then took so many seconds; give the warning, if one is due."""
        self._steps += 1
        if self._steps > 0:
            self._waited, self._total = self._waited + waited, self._total + waited + took
        if self._warned or self._steps < LEAST_STEPS or self._total < LEAST_SECONDS:
            return None
        fraction, self._steps, self._waited, self._total = self._waited / self._total, 0, 0.0, 0.0
        if fraction < STARVED:
            return None
        self._warned = True
        return (
            f"Steps wait {fraction:.0%} of their time for batches. More loader processes (data.workers={workers} now; "
            "results stay the same) or smaller images (declip data shard) help, where processors are free."
        )


def auto_workers(training: int) -> int:
    """Number of loader processes for the processors that are free: a rank's part of the machine's, less `training`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - training))
