"""What a run's numbers say about its health: named early, with the likely cause and what to try."""

import math
from collections.abc import Mapping

FLAT_AFTER = 300
"""Steps after which a contrast still at chance is worth a warning."""

STEEP = 50.0
"""A gradient that many times the usual one is a spike."""


class LossMonitor:
    """Looks at the logged numbers of a run, and says each thing once.

    Args:
        batch: Pairs a step: guessing gives a contrast of ln(batch).
        warmup: Steps of the learning rate's warm-up, in which nothing is said about spikes.
    """

    def __init__(self, batch: int, warmup: int) -> None:
        self.chance, self.batch, self.warmup = math.log(batch), batch, warmup
        self._said: set[str] = set()
        self._usual: float | None = None
        self._lowest = math.inf

    def look(self, step: int, values: Mapping[str, float]) -> list[str]:
        """Warnings about the values of a step.

        Args:
            step: Steps done.
            values: Terms by name, and "grad_norm".
        """
        # A value that is not finite is named by `NonFiniteGuard`; kept here, it would silence every later warning.
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        contrast = values.get("contrastive", values.get("late_interaction"))
        found: dict[str, str] = {}
        if contrast is not None and step >= FLAT_AFTER and abs(contrast - self.chance) < 0.02:
            found["flat"] = (
                f"After {step} steps the contrastive loss is still ln({self.batch}) = {self.chance:.2f}: nothing is "
                "learnt. Usual causes: too high a learning rate, captions that do not belong to the images, or one "
                "caption for all. Try a tenth of train.lr, and look at the pairs with declip data inspect."
            )
        if contrast is not None:
            # Pretrained weights may begin far above chance: what counts is a rise above the lowest so far.
            self._lowest = min(self._lowest, contrast)
        if contrast is not None and step > self.warmup and contrast > max(self.chance, self._lowest) + 1:
            found["worse"] = (
                f"At step {step} the contrastive loss is {contrast:.2f}, after {self._lowest:.2f}, and chance is "
                f"ln({self.batch}) = {self.chance:.2f}: the run diverges. Usual cause: too high a learning rate. Try "
                "half of train.lr, a longer train.warmup_steps, or train.grad_clip_norm=1.0."
            )
        norm = values.get("grad_norm")
        if norm is not None and self._usual is not None and step > self.warmup and norm > STEEP * self._usual:
            found["spike"] = (
                f"At step {step} the gradient's norm is {norm:.3g}, usually {self._usual:.3g}: a spike. If the loss "
                "does not come back, try train.grad_clip_norm=1.0 or a lower train.lr from the last checkpoint on."
            )
        if norm is not None:
            self._usual = norm if self._usual is None else 0.9 * self._usual + 0.1 * min(norm, 2 * self._usual)
        new = {name: text for name, text in found.items() if name not in self._said}
        self._said |= new.keys()
        return list(new.values())
