"""The sigmoid loss between images and texts: SigLIP's."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from declip.data.batch import Needs
from declip.supervision.contrastive import mean_in_blocks, scaled_similarity, to_float32
from declip.supervision.term import Rows, Similarity, Term, require


def sigmoid_loss(
    image: Tensor,
    text_keys: Tensor,
    scale: Tensor | float,
    bias: Tensor | float,
    offset: int = 0,
    max_logit_bytes: float | None = None,
) -> Tensor:
    """Binary cross-entropy of every image with every text, one positive per image: SigLIP, arXiv 2303.15343.

    Equals the plain loop, z = 1 where n = offset + b, else -1
        - 1/B Σ_b Σ_n log σ(z · (s·image[b]·text_keys[n] + bias))
    so the mean over ranks of the ranks' losses is the loss of the whole batch.
    Image features are (B, d) of this rank, text features (N, d) of all ranks; others as `cross_entropy_to_keys`.
    """
    image, text_keys = to_float32(image), to_float32(text_keys)

    def loss(start: int, stop: int) -> Tensor:
        logits = scaled_similarity(image[start:stop], text_keys, scale) + bias
        signs = torch.full_like(logits, -1.0, requires_grad=False)  # (rows, N)
        signs.diagonal(offset + start).fill_(1.0)
        return -F.logsigmoid(signs * logits).sum()

    return mean_in_blocks(loss, len(image), len(text_keys) * text_keys.itemsize, max_logit_bytes)


class Sigmoid(Term):
    """SigLIP's loss between the contrastive view, or else the first view, and the caption."""

    needs = Needs(optional_views=frozenset({"contrastive"}))
    reaches_all = uses_bias = True
    title = "sigmoid loss"
    explanation = "Says of each image and each caption of the batch whether they belong together."

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        bias = require(similarity.bias)
        return sigmoid_loss(own.images[0], keys.texts[0], similarity.scale, bias, offset, self.max_logit_bytes)

    def chance(self, batch_size: int) -> float:
        """Loss of equal logits for all pairs, with the best bias, -log(batch_size - 1)."""
        rest = batch_size - 1
        return math.log(batch_size) + rest * math.log(batch_size / rest)
