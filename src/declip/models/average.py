"""Averages of weights over training steps, for evaluation."""

from copy import deepcopy
from itertools import chain

import torch
from torch import nn


class Average:
    """Average of a module's parameters and buffers: exponential moving average, or with a decay of 1 the plain mean.

    The decay of the moving average grows as (1 + n) / (10 + n) up to `decay`, to forget the initial values. The plain
    mean weights all updates equally. The first update copies the values.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.n_averaged = deepcopy(module), decay, torch.tensor(0)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Include the module's present values, without a wait for the device (torch's `AveragedModel` has one)."""
        n = int(self.n_averaged)
        weight = 1 / (1 + n) if self.decay == 1 else 1 - min(self.decay, (1 + n) / (10 + n))
        both = (chain(each.parameters(), each.buffers()) for each in (self.module, module))
        for average, value in zip(*both, strict=True):
            if not n or not average.is_floating_point():
                average.copy_(value)
            elif value.requires_grad or not isinstance(value, nn.Parameter):  # frozen parameters do not change
                average.lerp_(value, weight)
        self.n_averaged += 1
