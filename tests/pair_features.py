"""Features of pairs that share directions, for tests of closed-form heads."""

import numpy as np
import torch

from declip.closed_form.choice import choose_heads
from declip.closed_form.pairs import ClassPairs, FitData, Pairs


def randn(*shape, seed=0):
    """Random numbers in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def features(n, v=12, w=7, seed=0, noise=0.1):
    """Images (n, v) and texts (n, w) that share four directions, with means that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.Generator().manual_seed(99)
    shared = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    sides = []
    for width in (v, w):
        mixing = torch.randn(4, width, generator=maps, dtype=torch.float64)
        blur = noise * torch.randn(n, width, generator=generator, dtype=torch.float64)
        sides.append(
            shared @ mixing + blur + torch.randn(width, generator=maps, dtype=torch.float64)
        )
    return sides[0], sides[1]


def pairs_of(n, **options):
    images, texts = features(n, **options)
    return Pairs(images, texts, torch.arange(n))


def class_pairs(count=60):
    """Classes whose rows and names share the directions that the pairs share."""
    rows, texts = features(count, seed=7)
    return ClassPairs(rows, texts, torch.arange(count), rows.mean(dim=0))


def data_of(pairs, groups=None, classes=None, **options):
    """What heads are fitted to; without groups each image is one."""
    groups = np.arange(len(pairs.images)) if groups is None else groups
    return FitData.of(pairs, groups, classes, **options)


def chosen(*given, **options):
    """The heads that are chosen for pairs; arguments as `data_of`."""
    return choose_heads(data_of(*given, **options))
