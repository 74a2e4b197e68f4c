"""DeCLIP's third supervision with neighbors that a frozen text encoder finds once, before the first step.

python examples/caption_neighbor.py pairs.csv runs/neighbor

Measured in docs/results.md ("Other losses in equal time").
"""

import sys

import torch
from torch import Tensor
from torch.nn.functional import normalize

import declip
from declip.data.batch import Needs
from declip.data.pair import BrokenPair, PairSource
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import ContrastiveTerm
from declip.supervision.nearest_neighbor import neighbor_contrast
from declip.supervision.term import Encodings, Rows, Similarity, require

TEXTS_AT_ONCE = 256
COSINES_AT_ONCE = 2**26  # 256 MiB


class CaptionNeighbor(ContrastiveTerm):
    """The loss between an image and the training caption most similar to its own, as a frozen encoder sees them.

    The feature of a caption is that of the last step that had it; before the first one, the own caption's is used.
    Both buffers are in checkpoints.
    """

    encoder = "builtin:lite2-minilm"  # weights that declip.load takes, with a text tower
    needs = Needs()
    run_state = ("neighbors", "features_of")
    title = "caption neighbors"
    explanation = "The contrastive loss with the most similar other caption of all pairs in place of the caption."
    neighbors: Tensor  # (n,) int64, of each training pair
    features_of: Tensor  # (n, d) float32, of the captions; 0 before a step had them

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.width = recipe.embed_dim
        self.pending: tuple[Tensor, Tensor] | None = None  # (N,) and (N, d), written after the step

    def prepare(self, source: PairSource, model: DualEncoder) -> None:
        self.register_buffer("neighbors", similar_captions(self.encoder, source))
        self.register_buffer("features_of", torch.zeros(len(source), self.width))

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        pairs = require(encoded.batch.sample_ids) % len(self.neighbors)
        return super().features(encoded) | {"pairs": pairs}

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        pairs = keys.extra["pairs"]  # (N,)
        texts = keys.texts[0].detach()  # (N, d)
        if self.training:
            self.pending = pairs, texts
        found = self.features_of[self.neighbors[pairs]]
        known = found.any(dim=1, keepdim=True)
        found = torch.where(known, found, texts)
        return neighbor_contrast(
            own.augmented, found[None], *self.options(own, keys, similarity, offset)
        )

    @torch.no_grad()
    def after_step(self, model: DualEncoder) -> None:
        if self.pending is not None:
            pairs, texts = self.pending
            self.features_of[pairs] = texts.to(self.features_of)
            self.pending = None


def similar_captions(encoder: str, source: PairSource) -> Tensor:
    """Find for each of n pairs the one with the most similar other captions, (n,) int64, by their mean features."""
    model = declip.load(encoder)
    captions: list[tuple[str, ...]] = []
    for index in range(len(source)):
        try:
            captions.append(source[index].captions())
        except BrokenPair:  # which no step has
            captions.append(())
    texts: list[str] = []
    owners: list[int] = []
    numbers: dict[tuple[str, ...], int] = {}
    for index, some in enumerate(captions):
        texts.extend(some)
        owners.extend([index] * len(some))
        numbers.setdefault(some, len(numbers))
    # --- the mean feature of each pair's captions, of length 1
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            parts.append(model.encode_text(texts[start : start + TEXTS_AT_ONCE]).float().cpu())
    rows = normalize(torch.cat(parts), dim=1)
    sums = torch.zeros(len(source), rows.shape[1])
    means = normalize(sums.index_add(0, torch.tensor(owners), rows), dim=1)
    same = torch.tensor([numbers[some] for some in captions])
    return nearest_captions(means, same)


def nearest_captions(features: Tensor, same: Tensor) -> Tensor:
    """For each of n pairs the one with the most similar other caption, (n,) int64; its own index without any.

    Equals the plain loop
        neighbors[i] = argmax over j with same[j] != same[i] of features[i]·features[j]
    Features (n, d) are of captions, of length 1; `same` (n,) is equal for pairs with equal captions.
    """
    everyone = torch.arange(len(features))
    found = []
    for rows in everyone.split(max(1, COSINES_AT_ONCE // max(1, len(features)))):
        cosines = features[rows] @ features.mT
        cosines = cosines.masked_fill(same[rows, None] == same, -torch.inf)
        largest, nearest = cosines.max(dim=1)
        found.append(torch.where(largest.isfinite(), nearest, rows))
    return torch.cat(found)


def main(data: str, out: str, encoder: str = CaptionNeighbor.encoder, **overrides: object) -> None:
    """Train the small demo model with CLIP's loss and this one."""

    class Neighbor(CaptionNeighbor):
        pass

    Neighbor.encoder = encoder
    overrides = {"loss_weights": {"contrastive": 0.8, "caption_neighbor": 0.2}, **overrides}
    declip.train(
        "demo-few-clip", overrides, out=out, data=data, terms={"caption_neighbor": Neighbor}
    )


if __name__ == "__main__":
    main(*sys.argv[1:4])
