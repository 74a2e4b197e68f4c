"""Word classification: the image feature predicts the words of its caption, as in SuperCLIP."""

import math
from collections import Counter

import torch
from torch import Tensor, nn

from declip.data.pair import BrokenPair, PairSource
from declip.data.plan import Needs
from declip.errors import UserError
from declip.io.pool import pairs_bar
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.contrastive import to_float32
from declip.supervision.term import Encodings, Rows, Similarity, Term, require

LEAST_PAIRS = 5  # that a token must occur in to be predicted
MOST_COUNTED = 100_000  # pairs that the tokens are counted in


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

    The words are the token ids of at least `LEAST_PAIRS` pairs, and the inverse document frequency of a word in df of N
    pairs is log((N + 1) / (df + 1)). With cached features, which hold no token ids, the targets are the words of all
    captions of a pair.
    """

    needs = Needs(pre_logits=True)
    over_vocabulary = ("head",)
    title = "word classification"
    explanation = "Predicts the words of the caption from the image feature."
    head: nn.Linear
    word_ids: Tensor
    idf: Tensor
    known: Tensor

    def __init__(self, recipe: Recipe, model: DualEncoder) -> None:
        super().__init__(recipe, model)
        self.width, self.end = model.image_tower.pre_logits_width, model.tokenizer.end
        self.cached = recipe.finetune.cached_views > 0

    def prepare(self, source: PairSource, model: DualEncoder, shown: bool = False) -> None:
        stride = 1 if source.remote else math.ceil(len(source) / MOST_COUNTED)
        counts: Counter[int] = Counter()
        total = 0
        with pairs_bar(shown) as bar:
            for index in bar.track(range(0, len(source), stride)[:MOST_COUNTED], description="Counting words"):
                words = self._words(source, model, index)
                counts.update(words)
                total += bool(words)
        common = {word: count for word, count in sorted(counts.items()) if count >= LEAST_PAIRS}
        if not common:
            raise UserError(
                f"No word occurs in {LEAST_PAIRS} pairs of '{source.name}', so word_classification has nothing to "
                "predict. Give more pairs, or set loss_weights.word_classification to 0."
            )
        self.register_buffer("word_ids", torch.tensor([*common]))
        self.register_buffer("idf", torch.tensor([math.log((total + 1) / (count + 1)) for count in common.values()]))
        self.head = nn.Linear(self.width, len(common))
        if self.cached:
            column_of = {word: column for column, word in enumerate(common)}
            pairs = (self._words(source, model, index) & column_of.keys() for index in range(len(source)))
            rows = [torch.tensor([column_of[word] for word in words], dtype=torch.int32) for words in pairs]
            padded = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=len(common))
            self.register_buffer("known", padded, persistent=False)  # (pairs, K) columns

    def _words(self, source: PairSource, model: DualEncoder, index: int) -> set[int]:
        """The token ids of a pair's captions without start and end; none where it cannot be read."""
        try:
            return {word for text in source.captions(index) for word in model.tokenizer.encode(text)[1:-1]}
        except BrokenPair:
            return set()

    def features(self, encoded: Encodings) -> dict[str, Tensor]:
        if "head" not in self._modules:
            raise UserError("word_classification counts words before it trains: call objective.prepare(source, model).")
        texts = encoded.batch.texts
        if texts.is_floating_point():
            columns = self.known[require(encoded.batch.sample_ids) % len(self.known)].long()
        else:
            columns = token_columns(texts, self.word_ids, self.end).transpose(0, 1).flatten(1)
        logits = self.head(require(encoded.outputs.pre_logits)).transpose(0, 1)
        return {"logits": logits, "targets": word_targets(columns, self.idf)}

    def keys(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}  # each image predicts its own words alone

    def loss(self, own: Rows, keys: Rows, similarity: Similarity, offset: int) -> Tensor:
        return word_cross_entropy(own.extra["logits"], own.extra["targets"])

    def chance(self, batch_size: int) -> float | None:
        return math.log(len(self.idf)) if "idf" in self._buffers else None
