"""Losses between images and texts: CLIP's InfoNCE, and SigLIP's sigmoid loss."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from declip.data.batch import Needs
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe, TextView
from declip.supervision.term import Encodings, Rows, Similarity, Term, require

BLOCK_BYTES = 2**26  # of logits held at a time: 64 MiB
BlockLoss = Callable[[int, int], Tensor]
Scale = Tensor | float  # a parameter of the model, or a constant
Ids = tuple[Tensor, Tensor]  # (B, k) of rows and (N, k) of keys, int64, 0 where unknown


def mean_in_blocks(
    loss: BlockLoss, rows: int, row_bytes: int, max_logit_bytes: float | None
) -> Tensor:
    """Mean over rows of a loss that sums over the rows from the first number to the second.

    The backward pass needs `row_bytes` of a row: its logits, or the positions of its maxima. If that is more than
    `max_logit_bytes` for all rows (None: never), the loss is computed in blocks.
    """
    if max_logit_bytes is None or rows * row_bytes <= max_logit_bytes:
        return loss(0, rows) / rows
    # Blocks are computed in both passes: 8·B·N·d operations instead of 6·B·N·d.
    size = max(1, BLOCK_BYTES // row_bytes)
    sums = []
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        block_sum = checkpoint(loss, start, stop, use_reentrant=False, preserve_rng_state=False)
        sums.append(block_sum)
    return torch.stack(sums).sum() / rows


def to_float32(x: Tensor) -> Tensor:
    """Convert to float32; float64 stays."""
    if x.dtype == torch.float64:
        return x
    return x.float()


def scaled_similarity(rows: Tensor, keys: Tensor, scale: Scale) -> Tensor:
    """Logits (B, N) of rows (B, d) and keys (N, d), times a scale, in full precision even inside autocast."""
    with torch.autocast(rows.device.type, enabled=False):
        # The scale multiplies the rows, so that nothing of the product's size is kept for the backward pass.
        return (scale * to_float32(rows)) @ to_float32(keys).mT


def cross_entropy_to_keys(
    rows: Tensor,
    keys: Tensor,
    scale: Scale,
    offset: int = 0,
    max_logit_bytes: float | None = None,
    smoothing: float = 0.0,
    ids: Ids | None = None,
) -> Tensor:
    """Cross-entropy of each row against all keys, its own key being row `offset` + its position.

    Equals the plain loop
        mean over b of  log Σₙ exp(s·rows[b]·keys[n]) - s·rows[b]·keys[offset + b]
    of L2-normalized rows (B, d) of this rank and keys (N, d) of all ranks, in rank order; with a label smoothing of ε
        mean over b of  log Σₙ exp(s·rows[b]·keys[n]) - Σₙ ((1 - ε)·[n = offset + b] + ε / N)·s·rows[b]·keys[n]
    With ids, the sums and N are over the own key and those that share no id with the row.
    The scale s is the inverse temperature exp(logit_scale); see `mean_in_blocks` for `max_logit_bytes`.
    """
    rows = to_float32(rows)
    keys = to_float32(keys)

    def loss(start: int, stop: int) -> Tensor:
        logits = scaled_similarity(rows[start:stop], keys, scale)
        positives = torch.arange(offset + start, offset + stop, device=rows.device)
        if smoothing or ids is not None:
            # (rows, N)
            positive = positives[:, None] == torch.arange(len(keys), device=rows.device)
        if ids is not None:
            own = ids[0][start:stop, None]
            others = ids[1]
            differs = (own != others) | (own == 0)  # (rows, N, k)
            kept = differs.all(dim=-1) | positive
            # The smallest number, since -inf times a target of 0 is not a number.
            logits = logits.masked_fill(~kept, torch.finfo(logits.dtype).min)
        if smoothing:  # targets (rows, N) in place of numbers of keys (arXiv 1512.00567, section 7)
            uniform = torch.full_like(logits, 1 / len(keys))
            if ids is not None:
                uniform = kept / kept.sum(dim=1, keepdim=True).to(logits.dtype)
            positives = torch.lerp(positive.to(logits.dtype), uniform, smoothing)
        return F.cross_entropy(logits, positives, reduction="sum")

    row_bytes = len(keys) * keys.itemsize
    return mean_in_blocks(loss, len(rows), row_bytes, max_logit_bytes)


def info_nce(
    image: Tensor,
    text: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    scale: Scale,
    offset: int = 0,
    max_logit_bytes: float | None = None,
    smoothing: float = 0.0,
    ids: Ids | None = None,
) -> Tensor:
    """Symmetric InfoNCE between images and texts: CLIP's loss (arXiv 2103.00020, figure 3), DeCLIP's L_CLIP.

    Equals the plain loop, y = offset + b
        ½ mean over b of [ logsumexpₙ(s·image[b]·text_keys[n]) - s·image[b]·text_keys[y]
                         + logsumexpₙ(s·text[b]·image_keys[n]) - s·text[b]·image_keys[y] ]
    so the mean over ranks of the ranks' losses is the loss of the whole batch.
    The features are (B, d) of this rank and (N, d) of all ranks, with gradient; others as `cross_entropy_to_keys`.
    """
    options = (scale, offset, max_logit_bytes, smoothing, ids)
    image_to_text = cross_entropy_to_keys(image, text_keys, *options)
    text_to_image = cross_entropy_to_keys(text, image_keys, *options)
    return (image_to_text + text_to_image) / 2


def sigmoid_loss(
    image: Tensor,
    text_keys: Tensor,
    scale: Scale,
    bias: Scale,
    offset: int = 0,
    max_logit_bytes: float | None = None,
) -> Tensor:
    """Binary cross-entropy of every image with every text, one positive per image: SigLIP, arXiv 2303.15343.

    Equals the plain loop, z = 1 where n = offset + b, else -1
        - 1/B Σ_b Σ_n log σ(z · (s·image[b]·text_keys[n] + bias))
    so the mean over ranks of the ranks' losses is the loss of the whole batch.
    Image features are (B, d) of this rank, text features (N, d) of all ranks; others as `cross_entropy_to_keys`.
    """
    image = to_float32(image)
    text_keys = to_float32(text_keys)

    def loss(start: int, stop: int) -> Tensor:
        logits = scaled_similarity(image[start:stop], text_keys, scale) + bias
        signs = torch.full_like(logits, -1.0, requires_grad=False)  # (rows, N)
        signs.diagonal(offset + start).fill_(1.0)
        return -F.logsigmoid(signs * logits).sum()

    row_bytes = len(text_keys) * text_keys.itemsize
    return mean_in_blocks(loss, len(image), row_bytes, max_logit_bytes)


def text_views(text: TextView) -> int:
    """The number of text views of losses that take two, where the recipe has two."""
    if text.second_view == "none":
        return 1
    return 2


class ContrastiveTerm(Term):
    """Base class of losses whose targets and negatives the section ``contrastive`` changes."""

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.smoothing = recipe.contrastive.label_smoothing
        self.masks_duplicates = recipe.contrastive.duplicates == "mask"

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        if self.masks_duplicates:
            return {"ids": require(encoded.batch.duplicate_ids)}
        return {}

    def options(
        self, own: Rows, keys: Rows, similarity: Similarity, offset: int
    ) -> tuple[Any, ...]:
        """The arguments of the losses after the features."""
        ids = None
        if self.masks_duplicates:
            ids = (own.extra["ids"], keys.extra["ids"])
        return similarity.scale, offset, self.max_logit_bytes, self.smoothing, ids

    def chance(self, batch_size: int) -> float:
        return math.log(batch_size)


class Contrastive(ContrastiveTerm):
    """CLIP's loss between the contrastive view, or else the first view, and the caption."""

    needs = Needs(optional_views=frozenset({"contrastive"}))
    reaches_all = True
    compares_pairs = True
    title = "contrastive loss"
    explanation = (
        "Picks the caption of each image, and the image of each caption, among those of the batch."
    )

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        features = own.images[0], own.texts[0], keys.images[0], keys.texts[0]
        options = self.options(own, keys, similarity, offset)
        return info_nce(*features, *options)


class Sigmoid(Term):
    """SigLIP's loss between the contrastive view, or else the first view, and the caption."""

    needs = Needs(optional_views=frozenset({"contrastive"}))
    reaches_all = True
    uses_bias = True
    title = "sigmoid loss"
    explanation = "Says of each image and each caption of the batch whether they belong together."

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        bias = require(similarity.bias)
        return sigmoid_loss(
            own.images[0], keys.texts[0], similarity.scale, bias, offset, self.max_logit_bytes
        )

    def chance(self, batch_size: int) -> float:
        """Loss of equal logits for all pairs, with the best bias, -log(batch_size - 1)."""
        rest = batch_size - 1
        return math.log(batch_size) + rest * math.log(batch_size / rest)
