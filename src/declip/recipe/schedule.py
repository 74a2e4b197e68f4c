"""The learning rate as a function of the step."""

import math

from declip.recipe.schema import Train

DECAY_FRACTION = 0.2
"""Last part of a wsd schedule, in which the learning rate falls (Hägele et al. 2024, arXiv 2405.18392)."""


def learning_rate(step: int, train: Train) -> float:
    """Compute the learning rate of a step, counted from 0: linear warm-up to `lr`, then the recipe's schedule.

    The first step has `warmup_lr`, step `warmup_steps` - 1 has `lr`. "cosine" falls to 0 at the last step (DeCLIP's
    YFCC15M recipe); "constant" stays; "wsd" stays, and falls to 0 as 1 - √x in the last fifth.
    """
    number, warmup = step + 1, min(train.warmup_steps, train.steps)
    if number < warmup:
        return train.warmup_lr + (train.lr - train.warmup_lr) * step / (warmup - 1)
    if number == warmup:
        return train.lr
    if train.lr_schedule == "cosine":
        progress = (number - warmup) / max(train.steps - warmup, 1)
        return train.lr * (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    if train.lr_schedule == "constant":
        return train.lr
    decay = max(min(round(DECAY_FRACTION * train.steps), train.steps - warmup), 1)
    progress = max(number - (train.steps - decay), 0) / decay
    return train.lr * (1 - math.sqrt(min(progress, 1.0)))
