"""The contrastive loss: CLIP's InfoNCE between images and texts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from declip.data.plan import Needs
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import ContrastiveConfig, Recipe
from declip.supervision import chunked
from declip.supervision.shared_logits import shared_info_nce
from declip.supervision.soft_targets import SoftTargets, soft_cross_entropy
from declip.supervision.term import Rows, Similarity, Term


def to_float32(x: Tensor) -> Tensor:
    """Convert to float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def scaled_similarity(rows: Tensor, keys: Tensor, scale: Tensor | float) -> Tensor:
    """Compute the dot products of all rows with all keys, times the scale, in full precision even inside autocast.

    The scale multiplies the rows, so that nothing of the product's size is kept for the backward pass.

    Args:
        rows: (B, d).
        keys: (N, d).
        scale: Factor of the logits, exp(logit_scale); a scalar.

    Returns:
        (B, N) logits, float32, or float64 for float64 input.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return (scale * to_float32(rows)) @ to_float32(keys).mT


def cross_entropy_to_keys(
    rows: Tensor,
    keys: Tensor,
    scale: Tensor | float,
    offset: int = 0,
    max_logit_bytes: float | None = None,
    soft: SoftTargets | None = None,
    other: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Cross-entropy of each row against all keys, its own key being row `offset` + its position.

    Equals the plain loop
        mean over b of  log Σₙ exp(s·rows[b]·keys[n]) - s·rows[b]·keys[offset + b]

    Args:
        rows: (B, d), L2-normalized, of this rank.
        keys: (N, d), L2-normalized, of all ranks in rank order; N >= offset + B.
        scale: exp(logit_scale), the inverse temperature.
        offset: Row of `keys` that belongs to the first of `rows`.
        max_logit_bytes: Bytes of logits that may be kept for the backward pass; more are computed in blocks, twice.
            None: all are kept.
        soft: Other targets than the row's own key alone, see `soft_cross_entropy`.
        other: Rows and keys of the other direction, for `soft.self_distillation`.
    """
    rows, keys, count = to_float32(rows), to_float32(keys), len(rows)
    too_large = chunked.exceeds(max_logit_bytes, rows, len(keys))
    if soft is None:
        if too_large:
            return chunked.cross_entropy(scale * rows, keys, offset)
        positives = torch.arange(offset, offset + count, device=rows.device)
        return F.cross_entropy(scaled_similarity(rows, keys, scale), positives)

    def block(start: int, stop: int) -> Tensor:
        prediction = None
        if other is not None and soft.self_distillation > 0:
            with torch.no_grad():
                prediction = scaled_similarity(other[0][start:stop], other[1], scale)
        logits = scaled_similarity(rows[start:stop], keys, scale)
        return soft_cross_entropy(logits, offset + start, soft.part(start, stop), prediction)

    if not too_large:
        return block(0, count) / count
    size = max(1, chunked.BLOCK_BYTES // (len(keys) * keys.itemsize))
    blocks = [(start, min(start + size, count)) for start in range(0, count, size)]
    sums = [checkpoint(block, *ends, use_reentrant=False, preserve_rng_state=False) for ends in blocks]
    return torch.stack(sums).sum() / count


def info_nce(
    image: Tensor,
    text: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    scale: Tensor | float,
    offset: int = 0,
    max_logit_bytes: float | None = None,
    soft: SoftTargets | None = None,
) -> Tensor:
    """Symmetric InfoNCE between images and texts: CLIP's loss (arXiv 2103.00020, figure 3), DeCLIP's L_CLIP.

    Equals the plain loop, y = offset + b
        ½ mean over b of [ logsumexpₙ(s·image[b]·text_keys[n]) - s·image[b]·text_keys[y]
                         + logsumexpₙ(s·text[b]·image_keys[n]) - s·text[b]·image_keys[y] ]
    so the mean over ranks of the ranks' losses is the loss of the whole batch.

    Args:
        image: (B, d) image features of this rank, L2-normalized.
        text: (B, d) text features of the same pairs, L2-normalized.
        image_keys: (N, d) image features of all ranks, with gradient; `image` itself on one process.
        text_keys: (N, d) text features of all ranks, with gradient.
        scale: exp(logit_scale).
        offset: Row of the keys that belongs to this rank's first pair.
        max_logit_bytes: See `cross_entropy_to_keys`.
        soft: The same.

    Returns:
        The loss, a scalar. Two (B, N) logit matrices are kept for the backward pass, up to `max_logit_bytes` each.
    """
    to_text, to_image = (image, text_keys), (text, image_keys)
    image_to_text = cross_entropy_to_keys(*to_text, scale, offset, max_logit_bytes, soft, to_image)
    text_to_image = cross_entropy_to_keys(*to_image, scale, offset, max_logit_bytes, soft, to_text)
    return (image_to_text + text_to_image) / 2


class ContrastiveTerm(Term):
    """Base class of the losses that the recipe's ``contrastive`` section gives other targets."""

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.section = recipe.contrastive

    def soft_targets(self, labels: Tensor | None, key_labels: Tensor | None) -> SoftTargets | None:
        """The targets at this point of the run; None where each pair has its own key alone."""
        section = self.section
        if section == ContrastiveConfig():
            return None
        alpha = section.self_distillation * (1 - math.cos(math.pi * self.progress)) / 2
        return SoftTargets(section.duplicates, section.label_smoothing, alpha, labels, key_labels)


class Contrastive(ContrastiveTerm):
    """CLIP's loss between the contrastive view, or else the first view, and the caption."""

    needs = Needs(optional_views=frozenset({"contrastive"}))
    title = "contrastive loss"
    explanation = "Picks the caption of each image, and the image of each caption, among those of the batch."

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.shares_logits = recipe.finetune.cached_views > 0  # most of such a step's time; other runs keep their bits

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        view = "contrastive" if "contrastive" in own.views else "first"
        features = own.image(view), own.texts[0], keys.image(view), keys.texts[0]
        soft = self.soft_targets(own.text_labels(0), keys.text_labels(0))
        alone = keys.texts is own.texts and not chunked.exceeds(self.max_logit_bytes, features[0], len(keys))
        if self.shares_logits and alone and soft is None:
            return shared_info_nce(features[0], features[1], similarity.scale)
        return info_nce(*features, similarity.scale, offset, self.max_logit_bytes, soft)

    def chance(self, batch_size: int) -> float:
        return math.log(batch_size)
