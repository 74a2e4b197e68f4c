"""A regularizer for frozen towers, STRUCTURE (arXiv 2506.16895), as a loss from outside the package.

python examples/structure.py pairs.csv runs/structure
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import declip
from declip.data.plan import Needs
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import to_float32
from declip.supervision.term import Encodings, Rows, Similarity, Term, require

TEMPERATURE = 0.05


def structure(features: Tensor, aligned: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Jensen-Shannon divergence between the neighborhoods of two spaces; STRUCTURE (arXiv 2506.16895), one level.

    Each of the two sets of rows is normalized, then centered: x̃. With P the row-wise softmax of x̃ᵢ·x̃ⱼ / τ of the
    features and Q that of the aligned ones, it equals
        mean over i of JS(P[i], Q[i])
        JS(p, q) = ½ Σⱼ pⱼ log(pⱼ / mⱼ) + ½ Σⱼ qⱼ log(qⱼ / mⱼ),  m = (p + q) / 2

    Args:
        features: (N, w) features of the frozen tower; no gradient.
        aligned: (N, d) the same rows in the shared space.
    """

    def neighborhoods(rows: Tensor) -> Tensor:
        rows = F.normalize(to_float32(rows), dim=-1)
        rows = rows - rows.mean(dim=0)
        return (rows @ rows.mT / temperature).softmax(dim=-1)

    with torch.autocast(aligned.device.type, enabled=False):
        p, q = neighborhoods(features.detach()), neighborhoods(aligned)
        middle = ((p + q) / 2).clamp(min=1e-30).log()
        return (_kl(p, middle) + _kl(q, middle)) / (2 * len(p))


def _kl(rows: Tensor, log_keys: Tensor) -> Tensor:
    # The clamp keeps the gradient of p log p finite where p is 0.
    return (rows * (rows.clamp(min=1e-30).log() - log_keys)).sum()


class Structure(Term):
    """STRUCTURE's regularizer of images and captions, over the pairs of all ranks."""

    needs = Needs(pre_logits=True)
    title = "structure regularizer"
    explanation = "Keeps the neighbors that images, and captions, have among the features of the frozen towers."

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        if not recipe.finetune.cached_views:
            raise UserError("structure compares features of frozen towers: set finetune.cached_views.")

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        # (B, w) of the frozen image tower, (B, w') of the frozen text tower
        return {"image": require(encoded.outputs.pre_logits)[0].float(), "text": encoded.batch.texts[0].float()}

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        images, texts = keys.augmented[0], keys.texts[0]  # (N, d) of all ranks
        return (structure(keys.extra["image"], images) + structure(keys.extra["text"], texts)) / 2


def main(data: str, out: str, **overrides: object) -> None:
    """Train two projections on frozen towers with the regularizer; its authors use a weight of 10."""
    weights = {"contrastive": 1.0, "structure": 10.0}
    overrides = {"loss_weights": weights, **overrides}
    declip.train("frozen", overrides, out=out, data=data, terms={"structure": Structure})


if __name__ == "__main__":
    main(*sys.argv[1:3])
