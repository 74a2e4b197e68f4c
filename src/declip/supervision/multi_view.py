"""The multi-view loss of DeCLIP: the contrastive loss between all other pairings of views."""

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from declip.data.batch import Needs
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import ContrastiveTerm, Ids, info_nce, text_views
from declip.supervision.term import Rows, Similarity


def multi_view(
    images: Tensor,
    texts: Tensor,
    image_keys: Tensor,
    text_keys: Tensor,
    scale: Tensor | float,
    offset: int = 0,
    max_logit_bytes: float | None = None,
    smoothing: float = 0.0,
    ids: Ids | None = None,
) -> Tensor:
    """Contrastive loss of all pairings of views but the first (L_MVS of DeCLIP, arXiv 2110.05208).

    Equals the plain loop, F = images, G = texts
        mean of InfoNCE(F₁, G₂), InfoNCE(F₂, G₁), InfoNCE(F₂, G₂)
    With other numbers of views V and T it is the mean of the V·T - 1 pairings after the first.
    The features are (V, B, d), (T, B, d) of this rank and (V, N, d), (T, N, d) of all ranks; others as
    `cross_entropy_to_keys`.
    """
    options = (scale, offset, max_logit_bytes, smoothing, ids)
    losses = []
    for i, j in product(range(len(images)), range(len(texts))):
        if i or j:
            loss = info_nce(images[i], texts[j], image_keys[i], text_keys[j], *options)
            losses.append(loss)
    return torch.stack(losses).mean()


class MultiView(ContrastiveTerm):
    """DeCLIP's multi-view loss over the augmented image views and both text views, or the caption alone."""

    needs = Needs(optional_views=frozenset({"second"}), texts=2)
    reaches_all = True
    title = "multi-view contrastive loss"
    explanation = (
        "The contrastive loss between all other pairings of the image views and the text views."
    )

    @classmethod
    def needs_in(cls, recipe: Recipe) -> Needs:
        return replace(cls.needs, texts=text_views(recipe.views.text))

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        features = own.augmented, own.texts, keys.augmented, keys.texts
        options = self.options(own, keys, similarity, offset)
        return multi_view(*features, *options)
