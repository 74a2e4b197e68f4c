"""The learning rate as a function of the step."""

import math

from declip.recipe.schema import Train


def learning_rate(step: int, train: Train) -> float:
    """Compute the learning rate of a step, counted from 0: linear warm-up to `lr`, then a cosine.

    The first step has `warmup_lr`, step `warmup_steps` - 1 has `lr`, the last one 0, as in DeCLIP's YFCC15M recipe.
    """
    number, warmup = step + 1, min(train.warmup_steps, train.steps)
    if number < warmup:
        return train.warmup_lr + (train.lr - train.warmup_lr) * step / (warmup - 1)
    if number == warmup:
        return train.lr
    progress = (number - warmup) / max(train.steps - warmup, 1)
    return train.lr * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
