"""Projections of frozen towers in closed form, chosen by cross-validation: no steps, no validation set needed."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Candidates, in units of the mean variance of a direction."""

CLASS_WEIGHTS = (1.0, 0.25, 0.0)
"""Candidates for the weight of a class, where an own image has 1; 0 leaves the classes out."""

DEFAULT_RIDGE, DEFAULT_CLASS_WEIGHT = 1.0, 1.0  # of fewer pairs than can be cross-validated
SCALES = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)  # candidates for the logit scale
FOLDS, FEWEST = 5, 20  # folds, and groups of pairs from which on there is a choice
OWN_MEAN = 10  # images of one's own that weigh as much as the start's mean feature


class Pairs(NamedTuple):
    """Features of images and of all their captions; each image counts once, however many captions it has."""

    images: Tensor  # (n, v)
    texts: Tensor  # (m, w)
    owners: Tensor  # (m,) int64, the image of each caption


class ClassPairs(NamedTuple):
    """A classifier as image-text pairs: the row of a class lies where its images lie (arXiv 2605.22484)."""

    rows: Tensor  # (c, v), the classifier's weights
    texts: Tensor  # (t, w), features of the classes' names and definitions
    owners: Tensor  # (t,) int64, the class of each text
    mean: Tensor  # (v,), mean feature of images, measured once for the start


class Heads(NamedTuple):
    """Two projections without biases into one space, where the cosine compares images and texts."""

    image: Tensor  # (k, v)
    text: Tensor  # (k, w)

    def similarities(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosines of images (n, v) and texts (m, w), (n, m)."""
        return normalize(images @ self.image.mT, dim=-1) @ normalize(texts @ self.text.mT, dim=-1).mT


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


def two_way_ridge(
    images: Tensor, texts: Tensor, weights: Tensor, ridges: tuple[float, ...], mean: Tensor | None = None
) -> list[Heads]:
    """Two linear projections from ridge regression in both directions, for each ridge.

    With X and Y the features without the direction of their mean, scaled to unit length, and Ω the weights,
        R₁ = (XᵀΩX + εₓI)⁻¹ XᵀΩY        R₂ = (YᵀΩY + εᵧI)⁻¹ YᵀΩX
        M = R₁/‖R₁‖ + R₂ᵀ/‖R₂‖ = U diag(s) Vᵀ
    the projections are √s Uᵀ and √s Vᵀ: the product of an image's and a text's projection is xᵀ M y. Projections
    without a bias cannot subtract a mean, so they ignore its direction.

    Args:
        images: (n, v).
        texts: (n, w), of the same pairs.
        weights: (n,), of the pairs.
        ridges: ε in units of the mean variance of a direction.
        mean: (v,) mean feature of images; None: that of `images`.
    """
    weights = (weights / weights.sum()).double()
    sides = []
    for features, center in ((images.double(), mean), (texts.double(), None)):
        center = weights @ features if center is None else center.double()
        direction = normalize(center, dim=0)
        unit = normalize(features - (features @ direction)[:, None] * direction, dim=-1)
        variances, axes = torch.linalg.eigh((unit * weights[:, None]).mT @ unit)  # the dominant cost: O(v³)
        sides.append((unit, variances.clamp(min=0), axes, direction))
    (x, x_variances, x_axes, x_mean), (y, y_variances, y_axes, y_mean) = sides
    cross = x_axes.mT @ ((x * weights[:, None]).mT @ y) @ y_axes  # (v, w), in the axes of both sides
    found = []
    for ridge in ridges:
        forward = cross / (x_variances + ridge * x_variances.mean())[:, None]
        backward = cross / (y_variances + ridge * y_variances.mean())
        units = (normalize(side.flatten(), dim=0).view_as(cross) for side in (forward, backward))
        left, right = split_product(sum(units, torch.zeros_like(cross)))
        projections = (left @ x_axes.mT, x_mean), (right @ y_axes.mT, y_mean)
        # Equal features have no variance in the mean's direction, others have: it must stay ignored.
        found.append(Heads(*(rows - (rows @ mean)[:, None] * mean for rows, mean in projections)))
    return found


def split_product(product: Tensor) -> tuple[Tensor, Tensor]:
    """Divide M = U diag(s) Vᵀ (v, w) into √s Uᵀ (k, v) and √s Vᵀ (k, w), largest first, k the smaller width.

    From the eigenvectors of MᵀM, which takes a fifth of the time of a singular value decomposition; directions below
    a millionth of the largest are 0.
    """
    if product.shape[0] < product.shape[1]:
        right, left = split_product(product.mT)
        return left, right
    squares, axes = (found.flip(-1) for found in torch.linalg.eigh(product.mT @ product))
    values = squares.clamp(min=0).sqrt()
    roots = values.sqrt()
    inverse = torch.where(values > 1e-6 * values.max(), 1 / roots, 0.0)
    return (product @ axes * inverse).mT, (axes * roots * (inverse > 0)).mT


def fit_heads(
    pairs: Pairs, chosen: Tensor, classes: ClassPairs | None, class_weight: float, ridges: tuple[float, ...]
) -> list[Heads]:
    """Heads of the chosen images (bool, (n,)) and of a classifier's classes, for each ridge."""
    captions = chosen[pairs.owners]
    owners = pairs.owners[captions]
    images, texts = [pairs.images[owners]], [pairs.texts[captions]]
    weights = [1 / torch.bincount(owners, minlength=len(pairs.images))[owners].double()]
    own = pairs.images[chosen].double()
    mean = None
    if classes is not None:
        mean = (OWN_MEAN * classes.mean.double() + own.sum(dim=0)) / (OWN_MEAN + len(own))
        if class_weight:
            # A classifier's rows are known up to a common vector, which softmax ignores.
            images.append((classes.rows - classes.rows.mean(dim=0))[classes.owners])
            texts.append(classes.texts)
            weights.append(class_weight / torch.bincount(classes.owners)[classes.owners].double())
    return two_way_ridge(torch.cat(images), torch.cat(texts), torch.cat(weights), ridges, mean)


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
        both = [sum(float((ranks < k).double().mean()) for ranks in (to_text, to_image)) / 2 for k in (1, 10)]
        recalls.append((count, *both))
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
