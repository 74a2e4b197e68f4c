"""Image-text contrast: CLIP's InfoNCE, and DeCLIP's multi-view term made of three of them."""

from itertools import islice, product

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.supervision import chunked as blockwise


def to_float32(x: Tensor) -> Tensor:
    """Give `x` in float32, or as it is when it is float64 already."""
    return x if x.dtype == torch.float64 else x.float()


def scaled_similarity(rows: Tensor, keys: Tensor, scale: Tensor | float) -> Tensor:
    """Dot products of all rows with all keys, times the scale, in full precision even inside autocast.

    The scale goes onto the rows, so that nothing of the product's size is kept for the backward pass.

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
    rows: Tensor, keys: Tensor, scale: Tensor | float, offset: int = 0, largest: float | None = None
) -> Tensor:
    """Cross-entropy of each row against all keys, its own key being row `offset` + its position.

    Equals the plain loop
        mean over b of  log Σₙ exp(s·rows[b]·keys[n]) - s·rows[b]·keys[offset + b]

    Args:
        rows: (B, d), L2-normalized, of this rank.
        keys: (N, d), L2-normalized, of all ranks in rank order; N >= offset + B.
        scale: exp(logit_scale), the inverse temperature.
        offset: Row of `keys` that belongs to the first of `rows`.
        largest: Bytes of logits that may be kept for the backward pass; more are made in blocks, twice. None: all.

    Returns:
        The loss, a scalar.
    """
    rows, keys = to_float32(rows), to_float32(keys)
    if blockwise.exceeds(largest, rows, len(keys)):
        return blockwise.cross_entropy(scale * rows, keys, offset)
    positives = torch.arange(offset, offset + len(rows), device=rows.device)
    return F.cross_entropy(scaled_similarity(rows, keys, scale), positives)


def info_nce(
    image: Tensor,
    text: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    scale: Tensor | float,
    offset: int = 0,
    largest: float | None = None,
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
        largest: See `cross_entropy_to_keys`.

    Returns:
        The loss, a scalar. Two (B, N) logit matrices are kept for the backward pass, up to `largest` each.
    """
    image_to_text = cross_entropy_to_keys(image, text_keys, scale, offset, largest)
    text_to_image = cross_entropy_to_keys(text, image_keys, scale, offset, largest)
    return (image_to_text + text_to_image) / 2


def multi_view(
    images: Tensor,
    texts: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    scale: Tensor | float,
    offset: int = 0,
    largest: float | None = None,
) -> Tensor:
    """Contrast of the augmented views: all pairings but the first (L_MVS of DeCLIP, arXiv 2110.05208).

    Equals the plain loop, F = images, G = texts
        mean of InfoNCE(F₁, G₂), InfoNCE(F₂, G₁), InfoNCE(F₂, G₂)
    With other numbers of views V and T it is the mean of the V·T - 1 pairings after the first.

    Args:
        images: (2, B, d) features of the image views, L2-normalized.
        texts: (2, B, d) features of the caption and its augmentation, L2-normalized.
        image_keys: (2, N, d) image features of all ranks, with gradient.
        text_keys: (2, N, d) text features of all ranks, with gradient.
        scale: exp(logit_scale).
        offset: Row of the keys that belongs to this rank's first pair.
        largest: See `cross_entropy_to_keys`.

    Returns:
        The loss, a scalar. Six (B, N) logit matrices are kept for the backward pass, up to `largest` each.
    """
    pairings = islice(product(range(len(images)), range(len(texts))), 1, None)
    losses = [info_nce(images[i], texts[j], image_keys[i], text_keys[j], scale, offset, largest) for i, j in pairings]
    return torch.stack(losses).mean()
