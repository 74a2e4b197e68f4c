"""What a step of each arm costs, measured in turns on the machine that the comparison runs on."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from declip.comparison.arms import Arm
from declip.training.step import training_step
from declip.training.trainer import Trainer

ROUNDS, WARM, TIMED = 3, 3, 8
"""Turns, and steps a turn: the first few fill caches and choose kernels."""


def seconds_per_step(arms: Sequence[Arm], overrides: Mapping[str, Any], threads: int) -> dict[str, float]:
    """Time a step of every arm, loading included: the median over all turns.

    The arms take turns, so that a machine that gets slower meanwhile is so for all of them.

    Args:
        arms: What to time.
        overrides: Of every recipe.
        threads: As the runs will have.

    Returns:
        Seconds by arm.
    """
    before = torch.get_num_threads()
    times: dict[str, list[float]] = {arm.name: [] for arm in arms}
    try:
        for _ in range(ROUNDS):
            for arm in arms:
                times[arm.name] += _turn(arm, {**overrides, "train.threads": threads})
    finally:
        torch.set_num_threads(before)
    return {name: median(values) for name, values in times.items()}


def _turn(arm: Arm, overrides: Mapping[str, Any]) -> list[float]:
    with TemporaryDirectory() as folder:
        trainer = Trainer(arm.resolve(overrides), Path(folder) / "run", quiet=True)
        times = []
        with trainer.learning():
            for _ in range(WARM + TIMED):
                start = time.perf_counter()
                training_step(trainer.parts, next(trainer.loader))
                if trainer.device.type == "cuda":
                    torch.cuda.synchronize(trainer.device)
                times.append(time.perf_counter() - start)
        trainer.loader.close()
    return times[WARM:]
