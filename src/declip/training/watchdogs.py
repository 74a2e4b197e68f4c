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
    """Finds problems in the logged numbers of a run and warns of each once.

    Args:
        batch_size: Pairs of a step; the chance level of the contrastive loss is its logarithm.
        warmup_steps: Steps without a warning about spikes.
    """

    def __init__(self, batch_size: int, warmup_steps: int) -> None:
        self.chance, self.batch_size, self.warmup_steps = math.log(batch_size), batch_size, warmup_steps
        self._warned: set[str] = set()
        self._usual_norm: float | None = None
        self._lowest = math.inf

    def check(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Give the new warnings after a number of steps, from the losses by name and "grad_norm"."""
        # `NonFiniteGuard` handles values that are not finite; kept here, they would silence every later warning.
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        warnings = self._check_loss(step, values.get("contrastive", values.get("late_interaction")))
        warnings |= self._check_norm(step, values.get("grad_norm"))
        new = {name: text for name, text in warnings.items() if name not in self._warned}
        self._warned |= new.keys()
        return list(new.values())

    def _check_loss(self, step: int, loss: float | None) -> dict[str, str]:
        if loss is None:
            return {}
        # Pretrained weights may begin far above chance: only a rise above the lowest loss so far counts.
        self._lowest = min(self._lowest, loss)
        if step >= FLAT_AFTER and abs(loss - self.chance) < 0.02:
            return {
                "flat": f"After {step} steps the contrastive loss is still at chance level, ln({self.batch_size}) = "
                f"{self.chance:.2f}. Usual causes: too high a learning rate, captions that do not belong to the "
                "images, or one caption for all. Try a tenth of train.lr, and declip data inspect."
            }
        if step > self.warmup_steps and loss > max(self.chance, self._lowest) + 1:
            return {
                "worse": f"At step {step} the contrastive loss is {loss:.2f}, after {self._lowest:.2f}; chance level "
                f"is {self.chance:.2f}: the run diverges. Usual cause: too high a learning rate. Try half of train.lr, "
                "a longer train.warmup_steps, or train.grad_clip_norm=1.0."
            }
        return {}

    def _check_norm(self, step: int, norm: float | None) -> dict[str, str]:
        if norm is None:
            return {}
        usual = self._usual_norm
        self._usual_norm = norm if usual is None else 0.9 * usual + 0.1 * min(norm, 2 * usual)
        if usual is None or step <= self.warmup_steps or norm <= STEEP * usual:
            return {}
        return {
            "spike": f"At step {step} the gradient norm is {norm:.3g}, usually {usual:.3g}: a spike. If the loss does "
            "not recover, try train.grad_clip_norm=1.0 or a lower train.lr from the last checkpoint on."
        }


class ThroughputMonitor:
    """Compares the time that steps wait for the loader with the time that they take.

    Args:
        workers: Processes that make batches; 0 makes them in this process.
        cores: Processors that are free for workers.

    Attributes:
        needed: Number of workers that would keep up, by the last measurement.
        fraction: Fraction of the time spent waiting, by the last measurement.
        warned: Whether `advice` has been given.
    """

    def __init__(self, workers: int, cores: int) -> None:
        self.workers, self.cores = workers, cores
        self.needed, self.fraction, self.warned = workers, 0.0, False
        self._steps, self._waited, self._took = -WARM, 0.0, 0.0

    def step(self, waited: float, took: float) -> None:
        """Count a step: seconds until its batch was there, and seconds that it then took."""
        self._steps += 1
        if self._steps > 0:
            self._waited, self._took = self._waited + waited, self._took + took

    def starved(self) -> bool:
        """Whether the steps since the last verdict waited too long and workers would help; updates `needed`."""
        total = self._waited + self._took
        if self._steps < LEAST_STEPS or total < LEAST_SECONDS:
            return False
        self.fraction = self._waited / total
        self.needed = workers_needed(self.workers, self._waited, self._took)
        self._steps, self._waited, self._took = 0, 0.0, 0.0
        return self.fraction > STARVED and self.needed > self.workers and self.cores > 0

    def advice(self) -> str:
        """Word the remedy."""
        self.warned = True
        text = (
            f"Steps wait {self.fraction:.0%} of their time for batches. data.workers={self.needed} would keep up (now "
            f"{self.workers}; results stay the same)"
        )
        if self.needed > self.cores:
            free = "processor is" if self.cores == 1 else "processors are"
            text += f", but {self.cores} {free} free for them: smaller files help, see declip data shard --help"
        return f"{text}. data.workers=auto adds workers by itself."


def workers_needed(workers: int, waited: float, took: float) -> int:
    """Number of workers that make a batch in the time that a step takes; arguments as in `ThroughputMonitor`."""
    # Duration of a batch on one worker: while steps starve, `workers` of them give one batch a step.
    duration = waited if workers == 0 else workers * (waited + took)
    return max(workers, math.ceil(duration / max(took, 1e-9)))


def free_cores(training: int) -> int:
    """Processors for a rank's workers: its part of the machine's, less the `training` ones."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - training)
