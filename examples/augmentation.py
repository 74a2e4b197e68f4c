"""Another image augmentation: a fifth of the views is solarized, as in BYOL (arXiv 2006.07733).

python examples/augmentation.py pairs.csv runs/solarized
"""

import sys

import numpy as np
from torch import Tensor

import declip


def solarize(view: Tensor, generator: np.random.Generator) -> Tensor:
    """Invert the bright pixels of a view (3, S, S) uint8; the generator belongs to the pair, so a run is repeatable."""
    return view.where(view < 128, 255 - view) if generator.random() < 0.2 else view


def main(data: str, out: str, **overrides: object) -> None:
    """Train the small demo model on these views."""
    declip.train("demo-clip", overrides, out=out, data=data, augment=solarize)


if __name__ == "__main__":
    main(*sys.argv[1:3])
