"""The learning rate as a function of the step."""

import math

from declip.recipe.schema import Train
from declip.training.optimizer import Pace


def learning_rate(step: int, train: Train) -> float:
    """Linear warm-up from `lr_start` to `lr_peak`, then a cosine to `lr_end` (DeCLIP's YFCC15M recipe).

    The first step has `lr_start`, step number `warmup_steps` (counted from 1) has `lr_peak`, the last has `lr_end`.

    Args:
        step: Counted from 0.
        train: The recipe's section.

    Returns:
        The rate of that step.
    """
    number, warmup = step + 1, min(train.warmup_steps, train.steps)
    if number < warmup:
        return train.lr_start + (train.lr_peak - train.lr_start) * step / (warmup - 1)
    share = (number - warmup) / max(train.steps - warmup, 1)
    return train.lr_end + (train.lr_peak - train.lr_end) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def paced(rate: float, step: int, pace: Pace, warmup_heads: int, train: Train) -> float:
    """The learning rate of a group of parameters.

    What waits for the heads stands still for `warmup_heads` steps, and warms up linearly in the `warmup_steps` after.

    Args:
        rate: The recipe's at that step.
        step: Counted from 0.
        pace: The group's.
        warmup_heads: The recipe's `finetune.warmup_heads`.
        train: The recipe's section.
    """
    if not pace.waits:
        return rate * pace.factor
    share = min(1.0, (step - warmup_heads + 1) / max(train.warmup_steps, 1))
    return rate * pace.factor * max(share, 0.0)
