"""The learning rate as a function of the step."""

import math

from declip.recipe.schema import Train
from declip.training.optimizer import LrMultiplier


def learning_rate(step: int, train: Train) -> float:
    """Linear warm-up from `warmup_lr` to `lr`, then a cosine to `min_lr` (DeCLIP's YFCC15M recipe).

    The first step has `warmup_lr`, step number `warmup_steps` (counted from 1) has `lr`, the last has `min_lr`.

    Args:
        step: Counted from 0.
        train: The recipe's section.

    Returns:
        The rate of that step.
    """
    number, warmup = step + 1, min(train.warmup_steps, train.steps)
    if number < warmup:
        return train.warmup_lr + (train.lr - train.warmup_lr) * step / (warmup - 1)
    share = (number - warmup) / max(train.steps - warmup, 1)
    return train.min_lr + (train.lr - train.min_lr) * (1 + math.cos(math.pi * min(share, 1.0))) / 2


def group_lr(rate: float, step: int, pace: LrMultiplier, head_warmup_steps: int, train: Train) -> float:
    """The learning rate of a group of parameters.

    What waits for the heads stands still for `head_warmup_steps` steps, and then warms up linearly.

    Args:
        rate: The recipe's at that step.
        step: Counted from 0.
        pace: The group's.
        head_warmup_steps: See `Recipe.head_warmup`.
        train: The recipe's section.
    """
    if not pace.waits:
        return rate * pace.factor
    share = min(1.0, (step - head_warmup_steps + 1) / max(train.warmup_steps, 1))
    return rate * pace.factor * max(share, 0.0)
