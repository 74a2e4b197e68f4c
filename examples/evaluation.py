"""Another evaluation: R@1 of held-out pairs every 100 steps, from the model that is trained.

python examples/evaluation.py pairs.csv runs/watched heldout.csv
"""

import sys
from collections.abc import Mapping
from typing import Any

import declip
from declip.training.sinks import RunInfo


class HeldOut(declip.Sink):
    """Evaluates the model at logged steps whose number is a multiple of `every`."""

    def __init__(self, pairs: str, every: int = 100) -> None:
        self.pairs, self.every = pairs, every

    def start(self, info: RunInfo) -> None:
        self.model = info.model

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if step % self.every == 0:
            # Leaves the model in training mode
            result = declip.evaluate(self.model, self.pairs, "retrieval")
            print(f"step {step}: R@1 {result.text_to_image.r1:.1%}")


def main(
    data: str, out: str, heldout: str | None = None, every: int = 100, **overrides: object
) -> None:
    """Train the small demo model and watch it on held-out pairs."""
    declip.train(
        "demo-clip", overrides, out=out, data=data, callbacks=[HeldOut(heldout or data, every)]
    )


if __name__ == "__main__":
    main(*sys.argv[1:4])
