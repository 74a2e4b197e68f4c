"""Image-text retrieval: R@K of captions looking for their image, and of images looking for one of their captions."""

from collections import defaultdict
from collections.abc import Sequence
from math import comb

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from declip.evaluation.encode import SourceFeatures
from declip.evaluation.results import RecallAtK, RetrievalResult

TIE = 1e-6  # cosines nearer than this are equal: features are float32
LOSS_BATCH = 128  # pairs that the contrastive loss of an evaluation compares
BLOCK = 8_000_000  # scores held at a time: 64 MB


def ranks(queries: Tensor, candidates: Tensor, right: Sequence[np.ndarray], *, block: int = BLOCK) -> np.ndarray:
    """Rank of each query's best right candidate, 1 being the first: (N,) int64.

    Ties count against the model: a wrong candidate whose cosine is as high as the best right one's (to `TIE`)
    counts as before it, so that a model that gives every input the same feature finds nothing. So does NaN::

        best = max(scores[i, j] for j in right[i])
        rank[i] = 1 + sum(not scores[i, j] <= best - TIE for j in range(M) if j not in right[i])

    Args:
        queries, candidates: (N, d) and (M, d), L2-normalized.
        right: N arrays, each of one or more right candidates.
        block: Largest number of scores held at a time, about; all N × M never are.
    """
    rows = max(1, block // len(candidates))
    candidates = candidates.double()
    parts = []
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows].double() @ candidates.T
        is_right = torch.zeros_like(scores, dtype=torch.bool)
        for row, columns in enumerate(right[start : start + rows]):
            is_right[row, torch.from_numpy(columns)] = True
        best = scores.masked_fill(~is_right, -torch.inf).amax(1, keepdim=True)
        parts.append(1 + (~(scores <= best - TIE) & ~is_right).sum(1))
    return torch.cat(parts).numpy()


def recall(rank: np.ndarray, right: Sequence[np.ndarray], candidates: int) -> RecallAtK:
    """Summarize the ranks (N,) of the best right candidates; the number of right ones sets the chance level."""
    hits = {f"r{k}": float(np.mean(rank <= k)) for k in (1, 5, 10)}
    chance = {f"chance{k}": _chance(k, right, candidates) for k in (1, 5, 10)}
    return RecallAtK(len(rank), candidates, **hits, **chance, median_rank=float(np.median(rank)))


def retrieve(features: SourceFeatures, scale: float | None = None) -> RetrievalResult:
    """Measure R@1, R@5 and R@10 both ways.

    A caption looks for its image among all images; an image looks for any one of its captions among the captions of
    all images. A caption that several images carry, word for word, is right for each of them, as in training. (CLIP's
    own evaluation counts it for one image; sets with sentences, such as COCO, hold very few of them.) Copies of an
    image with other captions are as wrong as any other image.
    With the `scale` of the model's logits the `contrastive_loss` is measured too, by the first caption of each image.
    """
    assert features.texts is not None, "encode the source with texts=True"
    images_of, rows_of, words = carriers_of(features), defaultdict(list), features.words
    for row, word in enumerate(words):
        rows_of[word].append(row)
    images_of_text = [images_of[word] for word in words]
    texts_of = {  # one array for the many images that share their captions, as names of classes
        own: np.array(sorted({row for word in own for row in rows_of[word]}), dtype=np.int64)
        for own in set(features.captions)
    }
    texts_of_image = [texts_of[own] for own in features.captions]
    first = np.unique(features.owners, return_index=True)[1]
    text_rank = ranks(features.texts, features.images, images_of_text)
    image_rank = ranks(features.images, features.texts, texts_of_image)
    return RetrievalResult(
        dataset=features.name,
        images=len(features),
        texts=len(words),
        text_to_image=recall(text_rank, images_of_text, len(features)),
        image_to_text=recall(image_rank, texts_of_image, len(words)),
        truncated_captions=features.truncated,
        loss=None if scale is None else contrastive_loss(features.images, features.texts[first], scale),
        skipped=dict(features.skipped.counts),
    )


def contrastive_loss(images: Tensor, texts: Tensor, scale: float) -> float:
    """Symmetric InfoNCE of held-out pairs in batches of about `LOSS_BATCH`, always the same: the validation loss.

    Equals the plain loop over batches of n pairs, weighted by n
        ½ mean over b of [ logsumexpₙ(s·image[b]·text[n]) + logsumexpₙ(s·text[b]·image[n]) - 2s·image[b]·text[b] ]

    Args:
        images, texts: (N, d), L2-normalized.
        scale: s, the model's exp(logit_scale).
    """
    order = torch.from_numpy(np.random.default_rng((0, len(images))).permutation(len(images)))
    total = 0.0
    for rows in order.tensor_split(-(-len(order) // LOSS_BATCH)):
        logits, target = scale * images[rows].double() @ texts[rows].double().T, torch.arange(len(rows))
        total += float(cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2 * len(rows)
    return total / len(order)


def carriers_of(features: SourceFeatures) -> dict[str, np.ndarray]:
    """Map each caption to the rows of the images that carry it, word for word."""
    carriers: dict[str, set[int]] = {}
    for word, owner in zip(features.words, features.owners.tolist(), strict=True):
        carriers.setdefault(word, set()).add(owner)
    return {word: np.array(sorted(rows), dtype=np.int64) for word, rows in carriers.items()}


def _chance(k: int, right: Sequence[np.ndarray], candidates: int) -> float:
    """R@k of a random order: 1 - C(M - c, k) / C(M, k) with c right ones among M, so k / M when c is 1."""
    k = min(k, candidates)
    return float(np.mean([1 - comb(candidates - len(columns), k) / comb(candidates, k) for columns in right]))
