"""Projections of frozen towers in closed form, chosen by cross-validation: no steps, no validation set needed."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from declip.models.two_way_ridge import DEFAULT_RIDGE, ClassPairs, Heads, Pairs, fit_heads

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Candidates, in units of the mean variance of a direction."""

CLASS_WEIGHTS = (1.0, 0.25, 0.0)
"""Candidates for the weight of a class, where an own image has 1; 0 leaves the classes out."""

DEFAULT_CLASS_WEIGHT = 1.0  # of fewer pairs than can be cross-validated
SCALES = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)  # candidates for the logit scale
FOLDS, FEWEST = 5, 20  # folds, and groups of pairs from which on there is a choice


@dataclass(frozen=True)
class Choice:
    """Heads for all pairs, with what cross-validation says about them.

    Attributes:
        recalls: For each fold its number of images, and R@1 and R@10, means of both directions.
        fit: (n,) out-of-fold rank of each image's best caption among its fold's, 0 best, 1 worst: large where a
            caption does not fit. NaN where nothing was left out.
    """

    heads: Heads
    ridge: float
    class_weight: float
    logit_scale: float
    recalls: tuple[tuple[int, float, float], ...] = ()
    fit: Tensor | None = None


def choose_heads(pairs: Pairs, groups: np.ndarray, classes: ClassPairs | None = None, seed: int = 0) -> Choice:
    """Choose ridge and weight of the classes by cross-validation, and fit the heads again on all pairs.

    Args:
        groups: (n,) int, equal for images that must stay in one fold: with nearly the same image or the same caption.
        classes: The classes of the image tower's classifier, if it has one.
    """
    everything = torch.ones(len(pairs.images), dtype=torch.bool)
    weights = CLASS_WEIGHTS if classes is not None else (0.0,)
    if len(np.unique(groups)) < FEWEST:
        weight = DEFAULT_CLASS_WEIGHT if classes is not None else 0.0
        (heads,) = fit_heads(pairs, everything, classes, weight, (DEFAULT_RIDGE,))
        return Choice(heads, DEFAULT_RIDGE, weight, 20.0)
    folds = torch.from_numpy(assign_folds(groups, FOLDS, seed))
    tried: dict[tuple[float, float], list[tuple[Tensor, Tensor, Tensor, Tensor]]] = {}
    for fold in range(FOLDS):
        for weight in weights:
            for ridge, heads in zip(RIDGES, fit_heads(pairs, folds != fold, classes, weight, RIDGES), strict=True):
                tried.setdefault((ridge, weight), []).append(held_out(heads, pairs, folds == fold))
    (ridge, weight), outcomes = max(tried.items(), key=lambda item: _reciprocal_rank(item[1]))
    (heads,) = fit_heads(pairs, everything, classes, weight, (ridge,))
    fit = torch.full((len(pairs.images),), torch.nan, dtype=torch.float64)
    recalls = []
    for fold, (_, _, to_text, to_image) in enumerate(outcomes):
        count, captions = int((folds == fold).sum()), len(to_image)
        fit[folds == fold] = to_text.double() / max(1, captions - 1)
        first, ten = (sum(float((ranks < k).double().mean()) for ranks in (to_text, to_image)) / 2 for k in (1, 10))
        recalls.append((count, first, ten))
    scale = min(SCALES, key=lambda scale: sum(_cross_entropy(s, relevant, scale) for s, relevant, *_ in outcomes))
    return Choice(heads, ridge, weight, scale, tuple(recalls), fit)


def held_out(heads: Heads, pairs: Pairs, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Retrieve among the chosen images: similarities, relevance (n, m), and both directions' ranks of the best match.

    Equal captions are one candidate.
    """
    captions = chosen[pairs.owners]
    texts, numbers = pairs.texts[captions].unique(dim=0, return_inverse=True)
    similarities = heads.similarities(pairs.images[chosen].double(), texts.double())
    relevant = torch.zeros_like(similarities, dtype=torch.bool)
    relevant[(chosen.cumsum(0) - 1)[pairs.owners[captions]], numbers] = True
    best = similarities.masked_fill(~relevant, -torch.inf)
    to_text = (similarities > best.amax(dim=1)[:, None]).sum(dim=1)
    to_image = (similarities > best.amax(dim=0)).sum(dim=0)
    return similarities, relevant, to_text, to_image


def assign_folds(groups: np.ndarray, folds: int, seed: int = 0) -> np.ndarray:
    """Assign groups to folds of nearly equal size: the largest first, equal ones in random order. (n,) int64."""
    names, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    order = order[np.argsort(-sizes[order], kind="stable")]
    filled, fold_of = np.zeros(folds, np.int64), np.zeros(len(names), np.int64)
    for group in order:
        fold_of[group] = filled.argmin()
        filled[fold_of[group]] += sizes[group]
    return fold_of[numbers]


def _reciprocal_rank(outcomes: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> float:
    """Mean reciprocal rank of all folds and both directions: smoother than R@1 where a fold has a dozen images."""
    ranks = [torch.cat([outcome[side] for outcome in outcomes]) for side in (2, 3)]
    return sum(float((1 / (1 + rank.double())).mean()) for rank in ranks) / 2


def _cross_entropy(similarities: Tensor, relevant: Tensor, scale: float) -> float:
    """Sum over images of the negative logarithm of the probability of their captions, by a softmax with the scale."""
    logits = scale * similarities
    matches = logits.masked_fill(~relevant, -torch.inf).logsumexp(dim=1)
    return float((logits.logsumexp(dim=1) - matches).sum())
