"""Words predicted from the image: targets against a plain loop, the vocabulary, cached features, and the head."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.fakes import Noise
from declip.data.batch import PairBatch
from declip.data.pair import BrokenPair
from declip.errors import UserError
from declip.supervision.word_classification import token_columns, word_cross_entropy, word_targets
from supervision.test_objective import parts, random_batch


class Captioned(Noise):
    """Pairs with these captions; a pair without one is broken."""

    def __init__(self, captions: Sequence[tuple[str, ...]]) -> None:
        super().__init__(len(captions))
        self.texts = captions

    def captions(self, index: int) -> tuple[str, ...]:
        if not self.texts[index]:
            raise BrokenPair("empty caption", str(index))
        return self.texts[index]


SOURCE = Captioned([("a b", "b c"), ("a b",), ("b", "c a a"), ("a d", "c"), ("b c a",), ("b d",), ()])
"""a: 5 pairs, b: 5, c: 4, d: 2; one is broken."""


def test_targets_and_loss_are_those_of_a_plain_loop(units: Callable[..., Tensor], no_device_reads: Any) -> None:
    texts = torch.tensor([[[90, 7, 3, 7, 91, 3], [90, 5, 91, 0, 0, 0], [90, 2, 2, 2, 2, 91]]])
    texts = torch.cat([texts, texts.flip(1)])
    word_ids, idf = torch.tensor([0, 3, 5, 7]), torch.tensor([0.7, 0.1, 0.2, 0.9], dtype=torch.float64)
    logits = (9 * units(3, 2, 4)).requires_grad_()
    with no_device_reads():
        columns = token_columns(texts, word_ids, 91).transpose(0, 1).flatten(1)
        targets = word_targets(columns, idf)
        found = word_cross_entropy(logits, targets)
    expected_targets, losses = [], []
    for b, words in enumerate([{7, 3}, {5}, {7, 3}]):  # both text views together; 0 and 3 are padding behind the end
        weights = [float(idf[c]) * (word in words) for c, word in enumerate(word_ids.tolist())]
        weights = weights if b < 2 else [0.0, 0.1, 0.0, 0.9]
        expected_targets.append([weight / sum(weights) for weight in weights])
        for view in logits[b]:
            log_probabilities = view - view.logsumexp(0)
            losses.append(-sum(t * x for t, x in zip(expected_targets[b], log_probabilities, strict=True)))
    torch.testing.assert_close(targets, torch.tensor(expected_targets, dtype=torch.float64))
    expected = torch.stack(losses).mean()  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    nothing = torch.full((3, 2), 4)
    assert word_cross_entropy(logits, word_targets(nothing, idf)).item() == 0


def test_the_vocabulary_is_that_of_words_in_five_pairs() -> None:
    model, objective = parts({"contrastive": 1.0, "word_classification": 0.5})
    with pytest.raises(UserError, match=r"objective\.prepare"):
        objective(model, random_batch())
    objective.prepare(SOURCE, model)
    term: Any = objective.terms["word_classification"]
    assert term.word_ids.tolist() == sorted(model.tokenizer.encode("a b")[1:-1])
    torch.testing.assert_close(term.idf, torch.full((2,), math.log(7 / 6)))
    assert term.chance(8) == math.log(2)
    with pytest.raises(UserError, match=r"loss_weights\.word_classification"):
        objective.prepare(Captioned([("a",)] * 4), model)


@pytest.mark.parametrize("image", ["declip_vit_tiny", "declip_conv_tiny"])
def test_every_view_predicts_the_words_and_cached_features_do_the_same(image: str) -> None:
    weights = {"contrastive": 1.0, "word_classification": 0.5}
    model, objective = parts(weights, image={"model": image, "size": 32})
    objective.prepare(SOURCE, model)
    model.eval()
    full = random_batch(6)
    texts = torch.stack([model.tokenizer([SOURCE.texts[i][view % len(SOURCE.texts[i])] for i in range(6)])
                         for view in range(2)])  # fmt: skip
    ids = torch.arange(6) + 7 * 3  # of a later epoch
    batch = PairBatch(full.views, texts, sample_ids=ids)
    losses = objective(model, batch)
    losses["loss"].backward()
    term: Any = objective.terms["word_classification"]
    assert term.head.weight.grad.abs().sum() > 0
    pooled = torch.stack([model.image_tower.pool(view.pixels) for view in batch.views.values()], dim=1)
    a, b = (int(term.word_ids[n] == model.tokenizer.encode("a")[1]) for n in (0, 1))
    assert (a, b) == (1, 0)
    multi_hot = torch.tensor([[1, 1], [1, 1], [1, 1], [1, 0], [1, 1], [0, 1.0]])
    expected = word_cross_entropy(term.head(pooled), multi_hot / multi_hot.sum(1, keepdim=True))
    torch.testing.assert_close(losses["word_classification"], expected)
    term.cached = True
    torch.manual_seed(0)
    objective.prepare(SOURCE, model)
    views = {name: model.image_tower.pool(view.pixels).detach() for name, view in batch.views.items()}
    floats = torch.stack([model.text_tower.pool(view).detach() for view in texts])
    cached = objective(model, replace(batch, views=views, texts=floats))
    expected = word_cross_entropy(term.head(pooled), multi_hot / multi_hot.sum(1, keepdim=True))
    torch.testing.assert_close(cached["word_classification"], expected)
