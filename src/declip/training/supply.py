"""Whether the loader keeps up with training, and how many workers would."""

import math
import os

STARVED = 0.25
"""Share of the time spent waiting for batches from which it is worth a word."""

LEAST_STEPS, LEAST_SECONDS = 20, 5.0
"""What is looked at before anything is said: fewer steps say little."""

WARM = 3
"""Steps after a start of the workers that do not count: they begin with an empty queue."""


class ThroughputMonitor:
    """Compares what steps wait for the loader with what they take.

    Args:
        workers: Processes that make batches; 0 makes them in this process.
        cores: Processors that this rank's workers may have; with none free, loading is work like any other.

    Attributes:
        workers: As given.
        needed: Workers that would do, by what was last measured.
        share: Of the time, what was spent waiting when `starved` last looked.
        told: Whether `advice` has been given.
    """

    def __init__(self, workers: int, cores: int) -> None:
        self.workers, self.cores = workers, cores
        self.needed, self.share, self.told = workers, 0.0, False
        self._steps, self._waited, self._took = -WARM, 0.0, 0.0

    def step(self, waited: float, took: float) -> None:
        """Count a step: seconds until its batch was there, and seconds that it then took."""
        self._steps += 1
        if self._steps > 0:
            self._waited, self._took = self._waited + waited, self._took + took

    def starved(self) -> bool:
        """Whether the steps since it last knew an answer waited too long; sets `needed` and `share`."""
        whole = self._waited + self._took
        if self._steps < LEAST_STEPS or whole < LEAST_SECONDS:
            return False
        self.share = self._waited / whole
        self.needed = workers_needed(self.workers, self._waited, self._took)
        self._steps, self._waited, self._took = 0, 0.0, 0.0
        return self.share > STARVED and self.needed > self.workers and self.cores > 0

    def advice(self) -> str:
        """What to do about it."""
        self.told = True
        now = "none" if self.workers == 0 else f"{self.workers}"
        words = (
            f"Steps spend {self.share:.0%} of their time waiting for batches. data.workers={self.needed} would keep up "
            f"(now {now}; results stay the same)"
        )
        if self.needed > self.cores:
            free = "processor is" if self.cores == 1 else "processors are"
            words += f", but {self.cores} {free} free for them: smaller files help, see declip data prepare --size"
        return f"{words}. data.workers=auto adds workers by itself."


def workers_needed(workers: int, waited: float, took: float) -> int:
    """Workers that make a batch in the time that a step takes, where steps wait for so many of them now.

    Args:
        workers: Those that there are; 0 makes batches in the training process.
        waited, took: Seconds of some steps, until their batch was there, and after.
    """
    # A worker's time for a batch: while steps starve, `workers` of them give one batch a step.
    each = waited if workers == 0 else workers * (waited + took)
    return max(workers, math.ceil(each / max(took, 1e-9)))


def free_cores(training: int) -> int:
    """Processors that a rank's workers may have: its share of this machine's, less those that train."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - training)
