"""Another optimizer: NAdam with the groups, learning rate and weight decay of the recipe.

python examples/optimizer.py pairs.csv runs/nadam
"""

import sys
from typing import Any

import torch

import declip


def nadam(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Build NAdam; the run sets the learning rate of each group before every step."""
    return torch.optim.NAdam(groups, betas=(0.9, 0.98), decoupled_weight_decay=True)


def main(data: str, out: str, **overrides: object) -> None:
    """Train the small demo model with NAdam."""
    declip.train("demo-clip", {"train.lr": 0.001, **overrides}, out=out, data=data, optimizer=nadam)


if __name__ == "__main__":
    main(*sys.argv[1:3])
