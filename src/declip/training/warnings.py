"""Warnings about a run: of losses, and of a slow loader."""

import math
import sys
from collections.abc import Mapping

FLAT_AFTER = 300  # steps after which a contrastive loss still at chance level is worth a warning
STARVED = 0.25  # fraction of time spent waiting for batches above which a warning is due
# Before a verdict about the loader
LEAST_STEPS = 20
LEAST_SECONDS = 5.0
WARM = 3  # steps after a start of the workers that do not count, because their queue is empty


class LossMonitor:
    """Warns once of a loss, `Objective.watched`, that stays at chance level or diverges."""

    def __init__(self, batch_size: int, warmup_steps: int, watched: str | None) -> None:
        self.watched = watched
        self.warmup_steps = warmup_steps
        self.chance = math.log(batch_size)
        self._lowest = math.inf

    def check(self, step: int, losses: Mapping[str, float]) -> str | None:
        """Return the warning that is due after a number of steps, if any."""
        name = self.watched
        loss = losses.get(name or "")
        if loss is None or not math.isfinite(loss):  # the trainer handles those that are not finite
            return None
        # Pretrained weights may begin far above chance: only a rise above the lowest loss so far counts.
        self._lowest = min(self._lowest, loss)
        flat = step >= FLAT_AFTER and abs(loss - self.chance) < 0.02
        usual = loss <= max(self.chance, self._lowest) + 1
        if not flat and (step <= self.warmup_steps or usual):
            return None
        self.watched = None  # no second warning
        if flat:
            return (
                f"After {step} steps the {name} loss is still that of guessing, {self.chance:.2f}. Usual causes: too "
                "high a train.lr, or captions that do not belong to the images. Try a tenth of it, and declip data "
                "inspect."
            )
        return (
            f"At step {step} the {name} loss is {loss:.2f}, after {self._lowest:.2f}: the run diverges. Try half of "
            "train.lr, a longer train.warmup_steps, or train.grad_clip_norm=1.0."
        )


class ThroughputMonitor:
    """Warns once when steps wait for the loader for much of their time."""

    def __init__(self) -> None:
        self._steps = -WARM
        self._waited = 0.0
        self._total = 0.0

    def check(self, waited: float, took: float, workers: int) -> str | None:
        """Count a step by its seconds of waiting and computing; return the warning that is due, if any."""
        self._steps += 1
        if self._steps > 0:
            self._waited += waited
            self._total += waited + took
        few = self._steps < LEAST_STEPS or self._total < LEAST_SECONDS
        if few or self._waited < STARVED * self._total:
            return None
        self._steps = -sys.maxsize  # no second warning
        return (
            f"Steps wait {self._waited / self._total:.0%} of their time for batches. Try more loader processes "
            f"(data.workers={workers} now) where processors are free, or smaller images (examples/shards.py)."
        )
