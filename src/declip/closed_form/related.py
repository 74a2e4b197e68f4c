"""Heads with neighbors, and the weights of these, chosen by cross-validation."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from declip.closed_form.candidates import CAUTION, best_candidate
from declip.closed_form.folds import assign_folds
from declip.closed_form.heads import FOLDS, Choice
from declip.closed_form.neighbors import (
    WEIGHTS,
    Neighbors,
    known_pairs,
    leading_axes,
    mean_by_owner,
)
from declip.closed_form.ranks import HeldOutRanks, ranks_by
from declip.closed_form.solve import ClassPairs, Heads, Pairs

SEED = 0  # of the start of the search for axes


def with_neighbors(
    choice: Choice, pairs: Pairs, groups: np.ndarray, classes: ClassPairs | None, seed: int = 0
) -> Choice:
    """Add neighbors to the heads of a choice, with the weights that rank left-out pairs best.

    The neighbors of a left-out pair are pairs of other folds. Of too few pairs to measure, the
    usual weights are taken. Arguments as of `choose_heads`.
    """
    weights = WEIGHTS[0]
    outcome = choice.outcome
    if outcome is not None:
        tried = _tried(choice, pairs, groups, classes, seed)
        weights = best_candidate(tried, WEIGHTS[0], CAUTION)
        outcome = tried[weights]
    if not any(weights):
        return choice
    known = replace(known_pairs(pairs, classes, seed), weights=torch.tensor(weights))
    axes = leading_axes(_known_rows(choice.heads, known, pairs, classes), SEED)
    heads = choice.heads._replace(neighbors=replace(known, axes=axes))
    scale = choice.logit_scale if outcome is None else outcome.best_scale()
    return replace(choice, heads=heads, outcome=outcome, logit_scale=scale)


def _tried(
    choice: Choice, pairs: Pairs, groups: np.ndarray, classes: ClassPairs | None, seed: int
) -> dict[tuple[float, float], HeldOutRanks]:
    """Out-of-fold ranks by each of `WEIGHTS`."""
    folds = torch.from_numpy(assign_folds(groups, FOLDS, seed))
    fitted, known = dict[int, Heads](), dict[int, Neighbors]()
    for fold in folds.unique().tolist():
        heads = choice.heads
        if choice.whole is not None:
            heads = choice.whole.heads_without(fold, choice.form)
        fitted[fold] = heads.to(pairs.images)
        known[fold] = known_pairs(_pairs_in(pairs, folds != fold), classes, seed)
    tried = {}
    for weights in WEIGHTS:
        of_folds = {}
        for fold, heads in fitted.items():
            neighbors = replace(known[fold], weights=torch.tensor(weights))
            of_folds[fold] = heads._replace(neighbors=neighbors) if any(weights) else heads
        tried[weights] = ranks_by(of_folds, pairs, folds)
    return tried


def _pairs_in(pairs: Pairs, kept: Tensor) -> Pairs:
    """The pairs of some images (n,) bool."""
    captions = kept[pairs.owners]
    owners = kept.cumsum(dim=0)[pairs.owners[captions]] - 1
    return Pairs(pairs.images[kept], pairs.texts[captions], owners)


def _known_rows(
    heads: Heads, known: Neighbors, pairs: Pairs, classes: ClassPairs | None
) -> Tensor:
    """All parts of the features of known images and texts, (r, k + a + c), without axes."""
    complete = heads.to(pairs.images)._replace(neighbors=known)
    images, texts = [pairs.images], [mean_by_owner(pairs.texts, pairs.owners, len(pairs.images))]
    if classes is not None:
        centers = classes.rows - classes.rows.mean(dim=0)
        images.append((centers + classes.mean).to(pairs.images))
        texts.append(mean_by_owner(classes.texts, classes.owners, len(centers)).to(pairs.texts))
    image_rows = complete.embed_images(torch.cat(images))
    text_rows = complete.embed_texts(torch.cat(texts))
    return torch.cat([image_rows, text_rows])
