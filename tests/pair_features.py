"""Features of pairs that share directions, for tests of closed-form heads."""

import torch

from declip.closed_form.pairs import ClassPairs, Pairs


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
