"""Heads with neighbors, and the weights of these, chosen by cross-validation."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.closed_form.candidates import CAUTION, best_candidate
from declip.closed_form.folds import assign_folds
from declip.closed_form.heads import FOLDS, Choice, improves, unchanged
from declip.closed_form.neighbors import Neighbors, Side, Similarities, leading_axes
from declip.closed_form.ranks import (
    HeldOutBlock,
    HeldOutRanks,
    blocks,
    caption_numbers,
    score,
)
from declip.closed_form.solve import ClassPairs, Heads, Pairs

# Of the neighbors among all known pairs, and among the classes; the projections have 1
WITHOUT = (0.0, 0.0)
WEIGHTS = ((0.5, 0.5), (1.0, 0.0), (1.0, 0.5), WITHOUT)
MOST = 2_000  # pairs that are known, at random among more
SEED = 0  # of the start of the search for axes


def choose_neighbors(
    linear: Choice, pairs: Pairs, groups: np.ndarray, classes: ClassPairs | None, seed: int = 0
) -> Choice:
    """Add neighbors to the heads of a choice, or to those of the start, or keep the start.

    The first of these that ranks left-out pairs better than the start. Arguments as of
    `choose_heads`.
    """
    choice = with_neighbors(linear, pairs, groups, classes, seed)
    if improves(choice, groups):
        return choice
    start = unchanged(linear.start_heads, linear.start)
    choice = with_neighbors(start, pairs, groups, classes, seed)
    return choice if improves(choice, groups) else start


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
    numbers = caption_numbers(pairs)
    parts = dict[tuple[float, float], list[tuple[HeldOutBlock, HeldOutRanks]]]()
    for fold in folds.unique().tolist():
        heads = choice.heads
        if choice.whole is not None:
            heads = choice.whole.heads_without(fold, choice.form)
        heads = heads.to(pairs.images)
        left_out = folds == fold
        known = known_pairs(_pairs_in(pairs, ~left_out), classes, seed)
        for block in blocks(left_out.nonzero().flatten(), pairs.owners, numbers):
            images, texts = pairs.images[block.images], pairs.texts[block.texts]
            projected = heads.similarities(images, texts)
            similarities = Similarities.of(projected, known, images, texts)
            for weights in filter(any, WEIGHTS):
                ranks = score(similarities.weighted(weights), block)
                parts.setdefault(weights, []).append((block, ranks))
    tried = {weights: HeldOutRanks.join(pairs, of_blocks) for weights, of_blocks in parts.items()}
    if choice.outcome is not None:  # without neighbors
        tried[WITHOUT] = choice.outcome
    return tried


def _pairs_in(pairs: Pairs, kept: Tensor) -> Pairs:
    """The pairs of some images (n,) bool."""
    captions = kept[pairs.owners]
    owners = kept.cumsum(dim=0)[pairs.owners[captions]] - 1
    return Pairs(pairs.images[kept], pairs.texts[captions], owners)


def _known_rows(heads: Heads, known: Neighbors, pairs: Pairs, classes: ClassPairs | None) -> Tensor:
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


def class_neighbors(heads: Heads, classes: ClassPairs) -> Neighbors:
    """Neighbors among classes alone, for the heads of a start without pairs, in their precision."""
    # A classifier's rows are known up to a common vector, which softmax ignores.
    centers = classes.rows - classes.rows.mean(dim=0)
    names = mean_by_owner(classes.texts, classes.owners, len(centers))
    images = Side(normalize(centers, dim=-1), classes.mean)
    weights = torch.tensor([1.0, 0.0]).to(centers)
    known = Neighbors(images, _text_side(names), 0, weights)
    complete = heads._replace(neighbors=known)
    rows = [complete.embed_images(centers + classes.mean), complete.embed_texts(names)]
    return replace(known, axes=leading_axes(torch.cat(rows), SEED))


def known_pairs(pairs: Pairs, classes: ClassPairs | None, seed: int = 0) -> Neighbors:
    """Make neighbors of pairs, `MOST` at random, and of a classifier's classes; weights as usual."""
    count = len(pairs.images)
    rows = torch.arange(count)
    if count > MOST:
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        rows = order[:MOST].sort().values
    kept = tuple(rows.tolist())
    images = pairs.images[rows].float()
    texts = mean_by_owner(pairs.texts.float(), pairs.owners, count)[rows]
    if classes is None:
        mean = images.mean(dim=0)
        return Neighbors(
            Side(normalize(images - mean, dim=-1), mean),
            _text_side(texts),
            0,
            torch.tensor(WEIGHTS[0]),
            rows=kept,
        )
    # A classifier's rows are known up to a common vector, which softmax ignores.
    centers = (classes.rows - classes.rows.mean(dim=0)).float()
    names = mean_by_owner(classes.texts.float(), classes.owners, len(centers))
    mean = classes.mean.float()
    anchors = torch.cat([normalize(images - mean, dim=-1), normalize(centers, dim=-1)])
    texts = torch.cat([texts, names])
    return Neighbors(
        Side(anchors, mean), _text_side(texts), len(centers), torch.tensor(WEIGHTS[0]), rows=kept
    )


def _text_side(texts: Tensor) -> Side:
    mean = texts.mean(dim=0)
    return Side(normalize(texts - mean, dim=-1), mean)


def mean_by_owner(rows: Tensor, owners: Tensor, count: int) -> Tensor:
    """Mean of the rows (m, w) of each owner (m,), (count, w)."""
    sums = rows.new_zeros(count, rows.shape[1]).index_add(0, owners, rows)
    return sums / torch.bincount(owners, minlength=count)[:, None]
