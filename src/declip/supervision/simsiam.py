"""Image self-supervision: SimSiam's negative cosine between two views of an image."""

import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Needs
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import to_float32
from declip.supervision.simclr import mlp
from declip.supervision.term import Encodings, Rows, Similarity, Term, augmented_views


def negative_cosine(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """SimSiam's symmetric loss with stopped targets (arXiv 2011.10566, equation 4): L_ISS of DeCLIP.

    Equals the plain loop
        -½ mean over b of [ cos(p1[b], z2[b]) + cos(p2[b], z1[b]) ],  no gradient into z
    with predictions p and projections z (B, d) of both views, of any length.
    """
    z1 = to_float32(z1.detach())
    z2 = to_float32(z2.detach())
    first = F.cosine_similarity(to_float32(p1), z2, dim=-1)
    second = F.cosine_similarity(to_float32(p2), z1, dim=-1)
    return -(first.mean() + second.mean()) / 2


class SimSiam(Term):
    """SimSiam between the two augmented image views, on the projected embedding as in DeCLIP."""

    needs = Needs(views=frozenset({"first", "second"}))
    title = "image self-supervision (SimSiam)"
    explanation = "Negative cosine between two views of an image; -1 is perfect agreement."

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        hidden, out, predictor_hidden = recipe.simsiam.widths
        self.projector = mlp(recipe.embed_dim, hidden, hidden, out)
        self.projector.add_module("norm3", nn.BatchNorm1d(out))
        self.predictor = mlp(out, predictor_hidden, out)  # a bottleneck

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        views = augmented_views(encoded.outputs.views)
        z1, z2 = map(self.projector, encoded.outputs.images[views])
        p1 = self.predictor(z1)
        p2 = self.predictor(z2)
        return {"p1": p1, "p2": p2, "z1": z1, "z2": z2}

    def keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}  # each image is compared with itself alone

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        return negative_cosine(**own.extra)

    def chance(self, batch_size: int) -> float:
        return 0.0
