"""Ranks of left-out pairs: how well heads find the captions of an image, and the reverse."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from declip.closed_form.estimates import Estimate, group_mean, jackknife
from declip.closed_form.heads import Heads
from declip.closed_form.pairs import Pairs

BLOCK = 1_000  # images that compete: the time grows with their number, not its square
SCALES = (5.0, 10.0, 15.0, 20.0, 30.0, 50.0, 100.0)  # candidates for the logit scale
FIRST = 10  # ranks that count as a hit in the score of a candidate


@dataclass(frozen=True)
class HeldOutRanks:
    """Out-of-fold ranks of n images and their m captions by one candidate, or of a block alone."""

    owners: Tensor  # (m,) int64, the image of each caption
    to_text: Tensor  # (n,) int64, rank of an image's best caption in its block, from 0
    to_image: Tensor  # (m,) int64, rank of a caption's best image
    first: Tensor  # (m,) int64, the image that came first for a caption
    images: Tensor  # (n,) int64, number of images in the block
    fit: Tensor  # (m,) mean rank of caption and image for each other, see `rank`
    losses: Tensor  # (n, scales) float64, cross-entropy of an image with its captions

    @classmethod
    def join(
        cls,
        pairs: Pairs,
        parts: Sequence[tuple["HeldOutBlock", "HeldOutRanks"]],
    ) -> "HeldOutRanks":
        """Concatenate the ranks of blocks that have all pairs, in the order of the pairs."""
        image_order = torch.cat([block.images for block, _ in parts]).argsort()
        caption_order = torch.cat([block.captions for block, _ in parts]).argsort()
        ranks = [each for _, each in parts]
        first = [block.images[each.first] for block, each in parts]
        return cls(
            owners=pairs.owners,
            to_text=torch.cat([each.to_text for each in ranks])[image_order],
            to_image=torch.cat([each.to_image for each in ranks])[caption_order],
            first=torch.cat(first)[caption_order],
            images=torch.cat([each.images for each in ranks])[image_order],
            fit=torch.cat([each.fit for each in ranks])[caption_order],
            losses=torch.cat([each.losses for each in ranks])[image_order],
        )

    def scores(self) -> Tensor:
        """(n,) the mean over both directions of reciprocal rank and hit among the first ten.

        The reciprocal rank alone is smoother than R@1 where there are a dozen images, but blind to
        R@10.
        """
        to_text = _score_of(self.to_text)
        to_image = self._by_image(_score_of(self.to_image))
        return (to_text + to_image) / 2

    def percentiles(self) -> Tensor:
        """(n,) fraction of the other pairs that an image and its captions beat; 0.5 by chance."""
        return 1 - self._by_image(self.fit.double())

    def best_scale(self) -> float:
        """The logit scale with the lowest cross-entropy."""
        best = int(self.losses.sum(dim=0).argmin())
        return SCALES[best]

    def percentile(self, groups: np.ndarray) -> Estimate:
        """Mean percentile of the images, with its interval."""
        return group_mean(self.percentiles().numpy(), groups).clipped()

    def recall(self, k: int, groups: np.ndarray) -> Estimate:
        """Recall at k, mean of both directions, with its interval."""
        hits, counts = self.by_group(k, groups)
        value = _recall(hits.sum(axis=0), counts.sum(axis=0))
        # Two groups of hits and two of misses, of mean size, as Agresti and Coull add to a
        # proportion: if all groups are hits, the interval would have no width otherwise.
        mean = counts.mean(axis=0)
        hits = np.vstack([hits, 2 * [mean], 2 * [0 * mean]])
        counts = np.vstack([counts, 4 * [mean]])
        all_hits = hits.sum(axis=0)
        all_counts = counts.sum(axis=0)
        other_hits = all_hits - hits
        other_counts = all_counts - counts
        without = (other_hits / other_counts).mean(axis=1)
        center = _recall(all_hits, all_counts)
        half = jackknife(without, counts.sum(axis=1))
        low = min(center - half, value)
        high = max(center + half, value)
        return Estimate(value, low, high).clipped()

    def by_group(self, k: int, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(groups, 2) hits among the first k, and their largest number: of images, of captions."""
        of_images = np.unique(groups, return_inverse=True)[1]
        of_captions = of_images[self.owners.numpy()]
        image_hits = np.bincount(of_images, self.to_text < k)
        caption_hits = np.bincount(of_captions, self.to_image < k)
        image_counts = np.bincount(of_images)
        caption_counts = np.bincount(of_captions)
        hits = np.stack([image_hits, caption_hits], axis=1)
        counts = np.stack([image_counts, caption_counts], axis=1)
        return hits, counts

    def _by_image(self, values: Tensor) -> Tensor:
        """Mean of the captions' values (m,) float64 for each image, (n,)."""
        counts = torch.bincount(self.owners, minlength=len(self.to_text))
        zeros = torch.zeros(len(counts)).double()
        sums = zeros.index_add(0, self.owners, values)
        return sums / counts


def _score_of(ranks: Tensor) -> Tensor:
    """Mean of the reciprocal rank and the hit among the first ten."""
    reciprocal = 1 / (1 + ranks.double())
    return (reciprocal + (ranks < FIRST)) / 2


def _recall(hits: np.ndarray, counts: np.ndarray) -> float:
    """Mean of both directions, of their hits (2,) and candidates (2,)."""
    return float((hits / counts).mean())


class HeldOutBlock(NamedTuple):
    """Images that compete with each other, and their captions; equal captions are one candidate."""

    images: Tensor  # (b,), rising
    captions: Tensor  # (c,)
    rows: Tensor  # (c,) row of the caption's image in the block
    columns: Tensor  # (c,) column of the caption among the distinct ones
    texts: Tensor  # (d,) a caption for each distinct one

    @classmethod
    def of(cls, images: Tensor, owners: Tensor, numbers: Tensor) -> "HeldOutBlock":
        """Images (b,), rising, with their captions.

        `owners` and `numbers` (see `caption_numbers`), (m,), are those of all captions.
        """
        captions = torch.isin(owners, images).nonzero().flatten()
        rows = torch.searchsorted(images, owners[captions])
        distinct, columns = numbers[captions].unique(return_inverse=True)
        texts = torch.empty(len(distinct), dtype=torch.int64)
        texts[columns] = captions
        return cls(images, captions, rows, columns, texts)


def blocks(held_out: Tensor, owners: Tensor, numbers: Tensor) -> Iterator[HeldOutBlock]:
    """Divide the images of a fold, those where `held_out` (n,) is true, into blocks of about `BLOCK`.

    Other arguments as for `HeldOutBlock.of`.
    """
    images = held_out.nonzero().flatten()
    count = max(1, round(len(images) / BLOCK))
    for part in images.tensor_split(count):
        yield HeldOutBlock.of(part, owners, numbers)


def caption_numbers(pairs: Pairs) -> Tensor:
    """(m,) int64, equal for equal captions."""
    return pairs.texts.unique(dim=0, return_inverse=True)[1]


def ranks_by(heads: Heads | Mapping[int, Heads], pairs: Pairs, folds: Tensor) -> HeldOutRanks:
    """Ranks of all pairs by heads that were not fitted to them, or each fold's."""
    numbers = caption_numbers(pairs)
    parts = []
    for fold in folds.unique().tolist():
        own = heads if isinstance(heads, Heads) else heads[fold]
        for block in blocks(folds == fold, pairs.owners, numbers):
            images = pairs.images[block.images].to(own.image)
            texts = pairs.texts[block.texts].to(own.image)
            similarities = own.similarities(images, texts)
            parts.append((block, score(similarities, block)))
    return HeldOutRanks.join(pairs, parts)


def score(similarities: Tensor, block: HeldOutBlock) -> HeldOutRanks:
    """Rank the captions for each image of a block, and the reverse, by similarities (b, d)."""
    rows = block.rows
    columns = block.columns
    relevant = torch.zeros_like(similarities, dtype=torch.bool)
    relevant[rows, columns] = True
    # --- retrieval: the rank of the best match
    best = similarities.masked_fill(~relevant, -torch.inf)
    top = best.amax(dim=1)  # (b,)
    to_text = (similarities > top[:, None]).sum(dim=1)
    to_image = (similarities > best.amax(dim=0)).sum(dim=0)  # (d,)
    # Of equal similarities the right one
    right = best.argmax(dim=0)
    first = torch.where(to_image == 0, right, similarities.argmax(dim=0))
    # --- the rank of each caption and its image for each other
    own = similarities[rows, columns]  # (c,)
    for_image = rank(similarities[rows], own, relevant[rows])
    for_caption = rank(similarities.mT[columns], own, relevant.mT[columns])
    return HeldOutRanks(
        owners=rows,
        to_text=to_text,
        to_image=to_image[columns],
        first=first[columns],
        images=torch.full_like(to_text, len(to_text)),
        fit=(for_image + for_caption) / 2,
        losses=_losses(similarities, relevant, top),
    )


def _losses(similarities: Tensor, relevant: Tensor, top: Tensor) -> Tensor:
    """Cross-entropy (b, scales) float64 of each image with its captions.

    The softmax over the captions, less that over the image's own ones, of which `top` (b,) is the
    largest similarity.
    """
    largest = similarities.amax(dim=1)
    images = relevant.nonzero()[:, 0]
    all_below = similarities - largest[:, None]
    own_below = similarities[relevant] - top[images]
    losses = list[Tensor]()
    for scale in SCALES:
        # Smaller exponents than -80 add nothing: their exponentials are denormal, or 0 at ten times
        # the cost.
        every = (scale * all_below).clamp(min=-80.0).exp().sum(dim=1)
        terms = (scale * own_below).clamp(min=-80.0).exp()
        own = torch.zeros_like(top).index_add(0, images, terms)
        losses.append(scale * (largest - top) + every.log() - own.log())
    return torch.stack(losses, dim=1).double()


def rank(similarities: Tensor, own: Tensor, relevant: Tensor) -> Tensor:
    """Rank of each correct candidate among the wrong ones: 0 if it is first, 1 if it is last.

    The fraction of the wrong candidates whose similarity (c, k) is larger than `own` (c,); equal
    ones count half. Its expectation, 1/2 by chance, does not depend on their number. Without any it
    is 1/2.
    """
    wrong = ~relevant
    larger = (similarities > own[:, None]) & wrong
    equal = (similarities == own[:, None]) & wrong
    ahead = larger.sum(dim=1) + equal.sum(dim=1) / 2
    counts = wrong.sum(dim=1)
    return torch.where(counts > 0, ahead / counts.clamp(min=1), 0.5)
