"""Masked language modeling: predicting the masked words of a caption, as BERT does."""

import math

import torch.nn.functional as F
from torch import Tensor

from declip.data.batch import IGNORED, Needs
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import to_float32
from declip.supervision.term import Encodings, Rows, Similarity, Term, require


def chosen_rows(
    words: Tensor, labels: Tensor, mask_positions: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Select the token states (M, w) whose word is to be predicted, and their targets (M,), pair after pair.

    From states (B, L, w), labels (B, L), -100 elsewhere, and the positions (M,) among the B * L, if known.
    """
    labels = labels.flatten()
    if mask_positions is None:  # waits for the device
        mask_positions = (labels != IGNORED).nonzero().squeeze(1)
    masked_words = words.flatten(0, 1)[mask_positions]
    return masked_words, labels[mask_positions]


def cross_entropy(logits: Tensor, targets: Tensor, count: Tensor | float | None = None) -> Tensor:
    """Mean cross-entropy over the words to predict (BERT, arXiv 1810.04805): L_TSS of DeCLIP, arXiv 2110.05208.

    Equals the plain loop, over the rows m whose target is not -100
        Σₘ [ log Σᵥ exp(logits[m, v]) - logits[m, targets[m]] ] / max(count, 1)
    The default count is the number of rows that count. When W ranks hold M rows together, M / W makes the mean of the
    ranks' losses the mean over all rows.
    """
    if count is None:
        count = (targets != IGNORED).sum().clamp(min=1)
    total = F.cross_entropy(to_float32(logits), targets, ignore_index=IGNORED, reduction="sum")
    return total / count


class MaskedLanguage(Term):
    """Prediction of the caption's masked tokens."""

    needs = Needs(masked=True)
    over_vocabulary = ("head",)
    title = "masked language modeling"
    explanation = "Predicts the masked tokens of the caption from the others."

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.head = model.text_tower.language_head()
        self.vocabulary = model.tokenizer.vocabulary

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        logits = self.head(require(encoded.outputs.masked_tokens))
        targets = require(encoded.outputs.targets)
        labels = require(encoded.batch.labels)
        count = (labels != IGNORED).sum(dim=1).float()
        return {"logits": logits, "targets": targets, "count": count}

    def keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"count": features["count"]}

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        # Divided by all ranks' tokens over the ranks, so that the mean over ranks is the mean over tokens.
        ranks = len(keys) / len(own)
        total = keys.extra["count"].sum()
        count = (total / ranks).clamp(min=1 / ranks)
        return cross_entropy(own.extra["logits"], own.extra["targets"], count=count)

    def chance(self, batch_size: int) -> float:
        return math.log(self.vocabulary)
