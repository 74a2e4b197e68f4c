"""The contrastive loss in which pairs with equal captions are not negatives of each other.

python examples/without_duplicates.py pairs.csv runs/products
"""

import math
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import declip
from declip.data.batch import Needs
from declip.supervision.contrastive import scaled_similarity
from declip.supervision.term import Encodings, Rows, Similarity, Term

MULTIPLIER = 6364136223846793005  # Knuth's, for hashes modulo 2⁶⁴


def caption_hashes(texts: Tensor) -> Tensor:
    """Hash texts (B, L), padded with 0 to any length, as (B,) int64, so that one number is compared for each."""
    return (texts * texts.new_full((texts.shape[1],), MULTIPLIER).cumprod(dim=0)).sum(dim=1)


def contrast(rows: Tensor, keys: Tensor, equal: Tensor, scale: Tensor | float, offset: int) -> Tensor:
    """Cross-entropy of each row against all keys but those with an equal caption.

    Equals the plain loop, y = offset + b, K = y and all n with not equal[b, n]
        mean over b of  log Σ over n in K of exp(s·rows[b]·keys[n]) - s·rows[b]·keys[y]
    """
    positives = torch.arange(offset, offset + len(rows), device=rows.device)
    hidden = equal & (positives[:, None] != torch.arange(len(keys), device=rows.device))
    return F.cross_entropy(scaled_similarity(rows, keys, scale).masked_fill(hidden, -torch.inf), positives)


class WithoutDuplicates(Term):
    """CLIP's loss between the first view and the caption, without negatives that have the same caption."""

    needs = Needs(optional_views=frozenset({"contrastive"}))
    reaches_all = compares_pairs = True
    title = "contrastive loss without duplicates"
    explanation = "Picks the caption of each image, and the image of each caption, among different ones."

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        return {"caption": caption_hashes(encoded.batch.texts[0])}

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        equal = own.extra["caption"][:, None] == keys.extra["caption"]  # (B, N)
        to_text = contrast(own.images[0], keys.texts[0], equal, similarity.scale, offset)
        return (to_text + contrast(own.texts[0], keys.images[0], equal, similarity.scale, offset)) / 2

    def chance(self, batch_size: int) -> float:
        return math.log(batch_size)


def main(data: str, out: str, **overrides: object) -> None:
    """Train the small demo model with the loss in place of the contrastive one."""
    overrides = {"loss_weights": {"without_duplicates": 1.0}, **overrides}
    declip.train("demo-few-clip", overrides, out=out, data=data, terms={"without_duplicates": WithoutDuplicates})


if __name__ == "__main__":
    main(*sys.argv[1:3])
