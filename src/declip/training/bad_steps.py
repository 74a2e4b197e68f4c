"""Steps whose loss or gradient is not finite: left out where the recipe allows it, else noticed, and the run's end."""

from collections.abc import Mapping

import torch
from torch import Tensor

from declip.runs.folder import log


class NonFiniteGuard:
    """Watches what each step gives, without waiting for the device at every one.

    Args:
        allowed: Steps that may be left out, `train.max_nonfinite_steps`.
        device: Where the terms are.

    Attributes:
        left_out: The steps that were, counted from 0.
    """

    def __init__(self, allowed: int, device: torch.device) -> None:
        self.allowed, self.left_out = allowed, list[int]()
        self._first = torch.tensor(-1, device=device)

    def look(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Keep the first bad step on the device: asking for it at once would be a wait."""
        good = torch.isfinite(values["loss"]) & torch.isfinite(values["grad_norm"])
        if self.allowed and not good:
            self.left_out.append(step)
            log.warning(
                "The loss is not finite at step %d: %s. The step is left out, nothing was changed by it; %d of at most "
                "%d (train.max_nonfinite_steps).",
                step + 1,
                shown(values),
                len(self.left_out),
                self.allowed,
            )
            good = torch.tensor(len(self.left_out) <= self.allowed)
        self._first = torch.where((self._first < 0) & ~good, step, self._first)

    @property
    def first(self) -> int | None:
        """The first bad step that was not left out; a wait for the device."""
        return None if (found := int(self._first)) < 0 else found


def shown(values: Mapping[str, Tensor]) -> str:
    """Terms with their values, for a message."""
    return ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
