"""The learning rate as a function of the step."""

import math

from declip.config import Train


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
