"""Image self-supervision of SLIP: SimCLR's NT-Xent between two views of an image."""

import math
from collections import OrderedDict
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from declip.data.batch import Needs
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import mean_in_blocks, scaled_similarity, to_float32
from declip.supervision.term import Encodings, Rows, Similarity, Term, augmented_views, require


def nt_xent(
    z1: Tensor,
    z2: Tensor,
    keys1: Tensor,
    keys2: Tensor,
    temperature: float = 0.1,
    offset: int = 0,
    max_logit_bytes: float | None = None,
) -> Tensor:
    """NT-Xent over both views of all images (SimCLR, arXiv 2002.05709, equation 1; SLIP, arXiv 2112.12750).

    Each view looks for the other view of its image among both views of all images, itself left out.
    Equals the plain loop, y = offset + b, all vectors normalized
        total[b] = Σₙ exp(z1[b]·keys2[n]/T) + Σ_{n≠y} exp(z1[b]·keys1[n]/T)
        ½ mean over b of [ log total[b] - z1[b]·keys2[y]/T + the same with 1 and 2 exchanged ]
    so the mean over ranks of the ranks' losses is the loss of the whole batch.
    Head outputs, of any length, are (B, d) of this rank and (N, d) of all ranks; others as `cross_entropy_to_keys`.
    """
    normalized = [F.normalize(to_float32(x), dim=-1) for x in (z1, z2, keys1, keys2)]
    z1, z2, keys1, keys2 = normalized
    scale = 1 / temperature

    def view(rows: Tensor, own_keys: Tensor, other_keys: Tensor) -> Tensor:
        def loss(start: int, stop: int) -> Tensor:
            positives = torch.arange(offset + start, offset + stop, device=rows.device)
            others = scaled_similarity(rows[start:stop], other_keys, scale)
            same = scaled_similarity(rows[start:stop], own_keys, scale)
            # (rows, 2N): the other view of all images, then the same view without the image itself
            itself = positives[:, None] == torch.arange(len(own_keys), device=rows.device)
            same = same.masked_fill(itself, -torch.inf)
            logits = torch.cat([others, same], dim=1)
            return F.cross_entropy(logits, positives, reduction="sum")

        row_bytes = 2 * len(own_keys) * rows.itemsize
        return mean_in_blocks(loss, len(rows), row_bytes, max_logit_bytes)

    first = view(z1, keys1, keys2)
    second = view(z2, keys2, keys1)
    return (first + second) / 2


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers between these widths, with batch norm and ReLU after all but the last; named as in checkpoints."""
    layers: dict[str, nn.Module] = {}
    for number, (width, out) in enumerate(pairwise(widths), 1):
        layers[f"linear{number}"] = nn.Linear(width, out)
        if number < len(widths) - 1:
            layers[f"norm{number}"] = nn.BatchNorm1d(out)
            layers[f"relu{number}"] = nn.ReLU()
    return nn.Sequential(OrderedDict(layers))


class SimCLR(Term):
    """SLIP's loss between the two augmented image views, on the feature before the projection."""

    needs = Needs(views=frozenset({"first", "second"}), pre_logits=True)
    title = "image self-supervision (SimCLR)"
    explanation = "Picks the other view of each image among both views of all images of the batch."

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        hidden, out = recipe.simclr.widths
        self.head = mlp(model.image_tower.pre_logits_width, hidden, hidden, out)

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        # (2, B, h), without the milder view
        augmented = augmented_views(encoded.outputs.views)
        first, second = require(encoded.outputs.pre_logits)[augmented]
        return {"z1": self.head(first), "z2": self.head(second)}

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        return nt_xent(
            own.extra["z1"],
            own.extra["z2"],
            keys.extra["z1"],
            keys.extra["z2"],
            offset=offset,
            max_logit_bytes=self.max_logit_bytes,
        )

    def chance(self, batch_size: int) -> float:
        return math.log(2 * batch_size - 1)
