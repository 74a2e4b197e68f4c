"""Image-text retrieval: R@K from captions to images and from images to captions."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from declip.evaluation.encode import SourceFeatures, check_widths
from declip.evaluation.results import RecallAtK, RetrievalResult

TIE = 1e-6  # cosines closer than this are equal: features are float32
LOSS_BATCH = 128  # pairs that the contrastive loss of an evaluation compares
BLOCK = 8_000_000  # scores in memory at a time: 64 MB
KS = (1, 5, 10)


def ranks(
    queries: Tensor, candidates: Tensor | None, correct: Sequence[np.ndarray], *, block: int = BLOCK
) -> np.ndarray:
    """Rank of the best correct candidate of each query, from 1: (N,) int64.

    Ties and NaN count against the model::

        best = max(scores[i, j] for j in correct[i])
        rank[i] = 1 + sum(not scores[i, j] <= best - TIE for j in range(M) if j not in correct[i])

    Queries (N, d) and candidates (M, d) are L2-normalized, or without candidates the scores (N, M); `correct` are N
    arrays of one or more candidates; `block` is about the number of scores in memory at a time.
    """
    count = queries.shape[1]
    if candidates is not None:
        check_widths(queries, candidates)
        count = len(candidates)
        candidates = candidates.double()
    rows = max(1, block // count)
    parts = []
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows].double()
        if candidates is not None:
            scores = scores @ candidates.T  # (rows, M)
        is_correct = torch.zeros_like(scores, dtype=torch.bool)
        for row, columns in enumerate(correct[start : start + rows]):
            is_correct[row, torch.from_numpy(columns)] = True
        # A wrong candidate with the same cosine ranks before the best correct one, so that a model with the same
        # feature for every input finds nothing. NaN is never `<=`.
        best = scores.masked_fill(~is_correct, -torch.inf).amax(1, keepdim=True)
        is_before = ~(scores <= best - TIE)
        parts.append(1 + (is_before & ~is_correct).sum(1))
    return torch.cat(parts).numpy()


def recall(rank: np.ndarray, candidates: int, chance: Sequence[float]) -> RecallAtK:
    """Summarize the ranks (N,) of the best correct candidates, with the chance levels at 1, 5 and 10."""
    hits = {f"r{k}": float(np.mean(rank <= k)) for k in KS}
    levels = {f"chance{k}": level for k, level in zip(KS, chance, strict=True)}
    return RecallAtK(len(rank), candidates, **hits, **levels, median_rank=float(np.median(rank)))


def chance_levels(correct: Sequence[int], distinct: int) -> list[float]:
    """R@1, R@5 and R@10 of a random order: k / n, where one of n distinct candidates is correct.

    `correct` says for each query how many of the `distinct` candidates are correct. A caption that
    several images share is one candidate. Where several candidates are correct, R@5 and R@10 are at
    most this high.
    """
    share = float(np.mean(correct)) / distinct
    return [min(1.0, k * share) for k in KS]


def retrieve(features: SourceFeatures, scale: float | None = None) -> RetrievalResult:
    """Compute R@1, R@5 and R@10 in both directions.

    Any caption of an image is correct for it. A caption that several images share, word for word, is correct for each
    of them, as in training; CLIP's own evaluation counts it for one image only. With the scale of the model's logits,
    the loss is the `contrastive_loss` with the first caption of each image.
    """
    assert features.texts is not None, "encode the source with texts=True"
    captions = features.flat_captions
    rows_of = rows_of_captions(features)
    carriers = carriers_of(features)
    images_of_text = [carriers[caption] for caption in captions]
    # One array for the many images that share their captions, as class names.
    texts_of = {
        own: np.unique(np.concatenate([rows_of[caption] for caption in own]))
        for own in set(features.captions)
    }
    correct_images = [len(rows) for rows in images_of_text]
    correct_texts = [len({*own}) for own in features.captions]
    text_chance = chance_levels(correct_images, len(features))
    image_chance = chance_levels(correct_texts, len(rows_of))
    text_rank = ranks(features.texts, features.images, images_of_text)
    image_rank = ranks(
        features.images, features.texts, [texts_of[own] for own in features.captions]
    )
    loss = None
    if scale is not None:
        first = np.unique(features.image_rows, return_index=True)[1]
        loss = contrastive_loss(features.images, features.texts[first], scale)
    return RetrievalResult(
        dataset=features.name,
        images=len(features),
        texts=len(captions),
        text_to_image=recall(text_rank, len(features), text_chance),
        image_to_text=recall(image_rank, len(captions), image_chance),
        truncated_captions=features.truncated,
        loss=loss,
        skipped=dict(features.skipped.counts),
    )


def contrastive_loss(images: Tensor, texts: Tensor, scale: float) -> float:
    """The validation loss: symmetric InfoNCE of held-out pairs, in the same batches of about `LOSS_BATCH` every time.

    Equals the plain loop over batches of n pairs, weighted by n
        ½ mean over b of [ logsumexpₙ(s·image[b]·text[n]) + logsumexpₙ(s·text[b]·image[n]) - 2s·image[b]·text[b] ]
    Features are (N, d), L2-normalized; the scale s is the model's exp(logit_scale).
    """
    generator = np.random.default_rng((0, len(images)))
    order = torch.from_numpy(generator.permutation(len(images)))
    total = 0.0
    batches = -(-len(order) // LOSS_BATCH)
    for rows in order.tensor_split(batches):
        scaled = scale * images[rows].double()
        logits = scaled @ texts[rows].double().T
        target = torch.arange(len(rows))
        both = cross_entropy(logits, target) + cross_entropy(logits.T, target)
        total += float(both) / 2 * len(rows)
    return total / len(order)


def rows_of_captions(features: SourceFeatures) -> dict[str, list[int]]:
    """Map each caption to the rows of `texts` with exactly this caption."""
    rows = dict[str, list[int]]()
    for row, caption in enumerate(features.flat_captions):
        rows.setdefault(caption, []).append(row)
    return rows


def carriers_of(features: SourceFeatures) -> dict[str, np.ndarray]:
    """Map each caption to the rows of the images with exactly this caption."""
    return {
        caption: np.unique(features.image_rows[rows])
        for caption, rows in rows_of_captions(features).items()
    }
