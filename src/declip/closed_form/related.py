"""Heads with neighbors, and the weights of these, chosen by cross-validation."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from declip.closed_form.candidates import CAUTION, best_candidate
from declip.closed_form.choice import Choice, improves, unchanged
from declip.closed_form.heads import Heads
from declip.closed_form.neighbors import Neighbors, Side, Similarities, leading_axes
from declip.closed_form.pairs import ClassPairs, FitData, Pairs, class_centers, random_rows
from declip.closed_form.ranks import (
    HeldOutBlock,
    HeldOutRanks,
    blocks,
    caption_numbers,
    score,
)

# Of the neighbors among all known pairs, and among the classes; the projections have 1
WITHOUT = (0.0, 0.0)
WEIGHTS = ((0.5, 0.5), (1.0, 0.0), (1.0, 0.5), WITHOUT)
MOST = 2_000  # pairs that are known, at random among more
SEED = 0  # of the start of the search for axes


def choose_neighbors(linear: Choice, data: FitData) -> Choice:
    """Add neighbors to the heads of a choice, or to those of the start, or keep the start.

    The first of these that ranks left-out pairs better than the start.
    """
    choice = with_neighbors(linear, data)
    if improves(choice, data.groups):
        return choice
    start = unchanged(linear.start_heads, linear.start)
    choice = with_neighbors(start, data)
    if improves(choice, data.groups):
        return choice
    return start


def with_neighbors(choice: Choice, data: FitData) -> Choice:
    """Add neighbors to the heads of a choice, with the weights that rank left-out pairs best.

    The neighbors of a left-out pair are pairs of other folds. Of too few pairs to measure, the
    usual weights are taken.
    """
    weights = WEIGHTS[0]
    outcome = choice.outcome
    if outcome is not None:
        tried = _try_weights(choice, data)
        tried[WITHOUT] = outcome
        weights = best_candidate(tried, WEIGHTS[0], CAUTION)
        outcome = tried[weights]
    if not any(weights):
        return choice
    known = known_pairs(data.pairs, data.classes, data.seed)
    known = replace(known, weights=torch.tensor(weights))
    axes = leading_axes(_known_rows(choice.heads, known, data), SEED)
    heads = choice.heads._replace(neighbors=replace(known, axes=axes))
    scale = choice.logit_scale
    if outcome is not None:
        scale = outcome.best_scale()
    return replace(choice, heads=heads, outcome=outcome, logit_scale=scale)


def _try_weights(choice: Choice, data: FitData) -> dict[tuple[float, float], HeldOutRanks]:
    """Out-of-fold ranks by each of `WEIGHTS` that has neighbors."""
    pairs = data.pairs
    folds = data.folds
    numbers = caption_numbers(pairs)
    heads = choice.heads.to(pairs.images)
    of_folds = dict.fromkeys(folds.unique().tolist(), heads)
    if choice.whole is not None:
        of_folds = choice.whole.heads_of_folds(choice.form)
    parts = dict[tuple[float, float], list[tuple[HeldOutBlock, HeldOutRanks]]]()
    for fold, fitted in of_folds.items():
        left_out = folds == fold
        others = pairs.of_images((~left_out).nonzero().flatten())
        known = known_pairs(others, data.classes, data.seed)
        for block in blocks(left_out, pairs.owners, numbers):
            images = pairs.images[block.images]
            texts = pairs.texts[block.texts]
            projected = fitted.to(images).similarities(images, texts)
            similarities = Similarities.of(projected, known, images, texts)
            for weights in filter(any, WEIGHTS):
                ranks = score(similarities.weighted(weights), block)
                parts.setdefault(weights, []).append((block, ranks))
    return {weights: HeldOutRanks.join(pairs, of_blocks) for weights, of_blocks in parts.items()}


def _known_rows(heads: Heads, known: Neighbors, data: FitData) -> Tensor:
    """All parts of the features of known images and texts, (r, k + a + c), without axes."""
    images = data.pairs.images
    texts = data.pairs.mean_texts()
    classes = data.classes
    complete = heads.to(images)._replace(neighbors=known)
    if classes is not None:
        class_images = class_centers(classes.rows) + classes.mean
        images = torch.cat([images, class_images.to(images)])
        texts = torch.cat([texts, classes.mean_texts().to(texts)])
    image_rows = complete.embed_images(images)
    text_rows = complete.embed_texts(texts)
    return torch.cat([image_rows, text_rows])


def class_neighbors(heads: Heads, classes: ClassPairs) -> Neighbors:
    """Neighbors among classes alone, for the heads of a start without pairs, in their precision."""
    centers = class_centers(classes.rows)
    names = classes.mean_texts()
    images = Side(normalize(centers, dim=-1), classes.mean)
    weights = torch.tensor([1.0, 0.0]).to(centers)
    known = Neighbors(images, _text_side(names), 0, weights)
    complete = heads._replace(neighbors=known)
    image_rows = complete.embed_images(centers + classes.mean)
    text_rows = complete.embed_texts(names)
    axes = leading_axes(torch.cat([image_rows, text_rows]), SEED)
    return replace(known, axes=axes)


def known_pairs(pairs: Pairs, classes: ClassPairs | None, seed: int = 0) -> Neighbors:
    """Neighbors among pairs, `MOST` random ones at most, and a classifier's classes; usual weights."""
    rows = random_rows(len(pairs.images), MOST, seed)
    images = pairs.images[rows].float()
    texts = pairs._replace(texts=pairs.texts.float()).mean_texts()[rows]
    mean = images.mean(dim=0) if classes is None else classes.mean.float()
    anchors = normalize(images - mean, dim=-1)
    count = 0
    if classes is not None:
        count = len(classes.rows)
        # In float32 only now: a difference of rounded rows would have lost digits
        centers = class_centers(classes.rows).float()
        anchors = torch.cat([anchors, normalize(centers, dim=-1)])
        names = classes._replace(texts=classes.texts.float()).mean_texts()
        texts = torch.cat([texts, names])
    image_side = Side(anchors, mean)
    weights = torch.tensor(WEIGHTS[0])
    numbers = tuple(rows.tolist())
    return Neighbors(image_side, _text_side(texts), count, weights, rows=numbers)


def _text_side(texts: Tensor) -> Side:
    """The known texts, less their mean."""
    mean = texts.mean(dim=0)
    return Side(normalize(texts - mean, dim=-1), mean)
