"""Word classification, SuperCLIP (arXiv 2512.14480), as a loss with a head from outside the package.

python examples/word_classification.py pairs.csv runs/words
"""

import math
import sys
from collections import Counter
from contextlib import suppress

import torch
from torch import Tensor, nn

import declip
from declip.data.batch import Needs
from declip.data.pair import BrokenPair, PairSource
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import to_float32
from declip.supervision.term import Encodings, Rows, Similarity, Term, require

MIN_PAIRS = 5  # that a token must occur in to be predicted
MAX_COUNTED = 100_000  # pairs that the tokens are counted in


def token_columns(texts: Tensor, word_ids: Tensor, end: int) -> Tensor:
    """Find the column of each token (..., L) in the rising ids of words (W,): W for others and behind the `end`."""
    places = torch.searchsorted(word_ids, texts.contiguous())
    known = word_ids[places.clamp(max=len(word_ids) - 1)] == texts
    padding = (texts == end).cumsum(dim=-1) > 0
    return places.masked_fill(~known | padding, len(word_ids))


def word_targets(columns: Tensor, idf: Tensor) -> Tensor:
    """IDF-weighted, normalized multi-hot targets (SuperCLIP, arXiv 2512.14480; from SuperClass, arXiv 2411.03313).

    Equals the plain loop
        targets[b, c] = idf[c] / Σ idf[d] over d in columns[b],  for c in columns[b]; else 0

    Args:
        columns: (B, K) int64, repeated or not; W, the number of words, counts for nothing.
        idf: (W,) float32 or float64.
    """
    hot = idf.new_zeros(len(columns), len(idf) + 1).scatter_(1, columns, 1.0)[:, :-1] * idf
    return hot / hot.sum(dim=1, keepdim=True).clamp(min=torch.finfo(idf.dtype).tiny)


def word_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy between the head's softmax over all words and the targets.

    Equals the plain loop
        mean over v, b of  -Σ_c targets[b, c]·log softmax(logits[b, v])[c]

    Args:
        logits: (B, V, W) of V image views.
        targets: (B, W), see `word_targets`.
    """
    return -(targets[:, None] * to_float32(logits).log_softmax(dim=-1)).sum(dim=-1).mean()


class WordClassification(Term):
    """Prediction of the words of all text views from the pooled feature of each image view, by one linear layer.

    The words are the token ids of at least `MIN_PAIRS` pairs, and the inverse document frequency of a word in df of N
    pairs is log((N + 1) / (df + 1)).
    """

    needs = Needs(pre_logits=True)
    over_vocabulary = ("head",)
    title = "word classification"
    explanation = "Predicts the words of the caption from the image feature."
    word_ids: Tensor
    idf: Tensor

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.width, self.end = model.image_tower.pre_logits_width, model.tokenizer.end

    def prepare(self, source: PairSource, model: DualEncoder) -> None:
        counts: Counter[int] = Counter()
        total = 0
        for index in range(min(len(source), MAX_COUNTED)):
            with suppress(BrokenPair):
                counts.update(
                    {
                        word
                        for text in source[index].captions()
                        for word in model.tokenizer.encode(text)[1:-1]
                    }
                )
                total += 1
        common = {word: count for word, count in sorted(counts.items()) if count >= MIN_PAIRS}
        if not common:
            raise UserError(
                f"No word occurs in {MIN_PAIRS} pairs of '{source.name}': nothing to predict."
            )
        self.register_buffer("word_ids", torch.tensor([*common]))
        self.register_buffer(
            "idf", torch.tensor([math.log((total + 1) / (count + 1)) for count in common.values()])
        )
        self.head = nn.Linear(self.width, len(common))

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        columns = token_columns(encoded.batch.texts, self.word_ids, self.end)  # (T, B, L)
        logits = self.head(require(encoded.outputs.pre_logits)).transpose(0, 1)  # (B, V, W)
        return {
            "logits": logits,
            "targets": word_targets(columns.transpose(0, 1).flatten(1), self.idf),
        }

    def keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}  # each image predicts its own words alone

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        return word_cross_entropy(own.extra["logits"], own.extra["targets"])

    def chance(self, batch_size: int) -> float | None:
        return math.log(len(self.idf)) if "idf" in self._buffers else None


def main(data: str, out: str, **overrides: object) -> None:
    """Train the small demo model with the additional loss."""
    overrides = {"loss_weights": {"contrastive": 1.0, "word_classification": 0.3}, **overrides}
    declip.train(
        "demo-few-clip",
        overrides,
        out=out,
        data=data,
        terms={"word_classification": WordClassification},
    )


if __name__ == "__main__":
    main(*sys.argv[1:3])
