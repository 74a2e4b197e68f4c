"""Heads on image features, which only training uses."""

from collections import OrderedDict
from itertools import pairwise

from torch import nn


def simclr_head(width: int, hidden: int = 4096, out: int = 256) -> nn.Sequential:
    """SLIP's head (arXiv 2112.12750), (B, width) → (B, out): three linear layers, batch norm and ReLU after two."""
    return _layers(width, hidden, hidden, out)


def projector(width: int, hidden: int = 1024, out: int = 1024) -> nn.Sequential:
    """SimSiam's projector (arXiv 2011.10566), (B, width) → (B, out): as `simclr_head`, with a batch norm at the end.

    DeCLIP puts it on the projected image embedding, 1024 wide throughout.
    """
    head = simclr_head(width, hidden, out)
    head.add_module("norm3", nn.BatchNorm1d(out))
    return head


def predictor(width: int = 1024, hidden: int = 512, out: int = 1024) -> nn.Sequential:
    """SimSiam's predictor (arXiv 2011.10566), (B, width) → (B, out): a bottleneck with batch norm and ReLU."""
    return _layers(width, hidden, out)


def _layers(*widths: int) -> nn.Sequential:
    """Linear layers between these widths, batch norm and ReLU after all but the last, named as in checkpoints."""
    layers: dict[str, nn.Module] = {}
    for number, (width, out) in enumerate(pairwise(widths), 1):
        layers[f"linear{number}"] = nn.Linear(width, out)
        if number < len(widths) - 1:
            layers |= {f"norm{number}": nn.BatchNorm1d(out), f"relu{number}": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers))
