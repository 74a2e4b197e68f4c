"""Retrieval against matrices worked out by hand and a plain loop; chance levels against models of random features."""

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from torch.nn.functional import normalize

from declip.evaluation.linear_probe import Labeled
from declip.evaluation.retrieval import chance_levels, contrastive_loss, ranks, recall, retrieve
from evaluation.conftest import features_of, probe


def _singles(*columns):
    return [np.array([column]) for column in columns]


def _random(shape, generator=None):
    """Rows of length 1."""
    generator = generator or torch.Generator().manual_seed(0)
    return normalize(torch.randn(shape, generator=generator), dim=-1)


def _rank_by_loop(scores, right):
    found = []
    for row, own in zip(scores, right, strict=True):
        best = max(row[j] for j in own)
        found.append(1 + sum(row[j] > best - 1e-6 for j in range(len(row)) if j not in own))
    return found


def test_ties_and_nan_go_against_the_model():
    scores = torch.tensor(
        [[0.5, 0.5, 0.5], [0.2, 0.2, 0.1], [0.1, 0.2, 0.2], [0.3, 0.3 + 1e-8, 0.0]]
    )
    assert ranks(scores, torch.eye(3), _singles(0, 0, 1, 0)).tolist() == [3, 2, 2, 2]
    nan = float("nan")
    scores = torch.tensor([[0.9, nan, 0.1], [0.9, nan, 0.1], [nan, nan, nan]])
    assert ranks(scores, torch.eye(3), _singles(0, 1, 2)).tolist() == [3, 3, 3]
    for value in (nan, 8**-0.5):  # a model that says always the same finds nothing
        same = torch.full((20, 8), value)
        result = retrieve(features_of(same, [(f"text {row}",) for row in range(20)], same))
        assert (result.text_to_image.r10, result.image_to_text.r10) == (0, 0)
        assert result.text_to_image.median_rank == 20


@pytest.mark.parametrize("block", [1, 37, 10_000])
def test_ranks_equal_a_loop_whatever_the_block(block):
    rng = default_rng(3)
    queries, candidates = rng.standard_normal((41, 6)), rng.standard_normal((29, 6)).round(1)
    candidates[5] = candidates[17]
    right = [rng.choice(29, size=rng.integers(1, 4), replace=False) for _ in range(41)]
    found = ranks(torch.from_numpy(queries), torch.from_numpy(candidates), right, block=block)
    assert found.tolist() == _rank_by_loop(queries @ candidates.T, right)


def test_recall_and_chance_by_hand():
    found = recall(np.array([1, 1, 3, 6, 11, 40]), 50, (0.1, 0.2, 0.3))
    assert (found.r1, found.r5, found.r10, found.chance5) == (2 / 6, 3 / 6, 4 / 6, 0.2)
    assert found.median_rank == 4.5
    assert chance_levels([1] * 6, 50) == pytest.approx([1 / 50, 5 / 50, 10 / 50])
    assert chance_levels([1], 3) == pytest.approx([1 / 3, 1, 1])
    assert chance_levels([1, 3], 40) == pytest.approx([1 / 20, 1 / 4, 1 / 2])


def test_both_directions_with_several_captions():
    captions = [("a", "b"), ("c",), ("d", "e", "f")]
    # a, c, e and f find their image first, b second, d third.
    texts = torch.tensor([[9, 1, 0], [1, 8, 0], [3, 5, 1], [9, 5, 1], [0, 0, 7], [0, 0, 2]]) / 10
    result = retrieve(features_of(torch.eye(3), captions, texts))
    assert (result.images, result.texts) == (3, 6)
    assert result.text_to_image.r1 == pytest.approx(4 / 6)
    assert result.text_to_image.r5 == 1.0
    assert result.text_to_image.median_rank == 1.0
    # image 0: a and d tie at 0.9, against it; image 1: b 0.8 is before c 0.5, d too; image 2: e.
    assert result.image_to_text.r1 == pytest.approx(1 / 3)
    assert result.image_to_text.median_rank == 2.0
    assert result.image_to_text.chance1 == pytest.approx((2 + 1 + 3) / 6 / 3)


def test_the_loss_is_that_of_each_image_with_its_first_caption():
    captions = [("a", "b"), ("c",), ("d", "e", "f")]
    images, texts = _random((2, 6, 4))
    result = retrieve(features_of(images[:3], captions, texts), scale=5.0)
    assert result.loss == contrastive_loss(images[:3], texts[[0, 2, 3]], 5.0)


def test_the_loss_of_many_pairs_is_the_mean_over_pairs_of_batches():
    images, texts = _random((2, 257, 4)).double()
    total = 0.0
    for rows in np.array_split(default_rng((0, 257)).permutation(257), 3):
        logits = 5 * images[rows] @ texts[rows].T
        for logs in (logits.log_softmax(dim=1), logits.log_softmax(dim=0)):
            total -= float(logs.diagonal().sum()) / 2
    assert contrastive_loss(images, texts, 5.0) == pytest.approx(total / 257)


def test_a_caption_that_two_images_share():
    images = torch.tensor([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 0.0, 1.0]])
    cat, dog, tail = [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.1, 1.0, 0.0]
    texts = torch.tensor([cat, cat, tail, dog])
    result = retrieve(features_of(images, [("cat",), ("cat", "tail"), ("dog",)], texts))
    # The second cat's caption finds the first cat; "tail" finds its own
    assert result.text_to_image.r1 == 1.0
    assert result.image_to_text.r1 == 1.0
    # Among three distinct captions
    assert result.image_to_text.chance1 == pytest.approx((1 + 2 + 1) / 3 / 3)
    alone = retrieve(features_of(images, [("cat",), ("a cat", "tail"), ("dog",)], texts))
    assert alone.text_to_image.r1 == pytest.approx(3 / 4)
    assert alone.image_to_text.r1 == pytest.approx(1 / 3)  # equal features of different words tie


UNEQUAL = np.r_[np.zeros(70, dtype=int), np.ones(30, dtype=int), 2 + np.arange(20) % 10]
CAPTIONS = {
    "unequal class names": [(f"class {label}",) for label in UNEQUAL],
    "sentences": [tuple(f"{row} {number}" for number in range(5)) for row in range(30)],
    "both": [
        (f"class {row % 7}", f"own {row}") if row % 3 else (f"class {row % 2}",)
        for row in range(80)
    ],
}


@pytest.mark.parametrize("captions", CAPTIONS.values(), ids=CAPTIONS)
def test_random_features_are_at_chance_in_both_directions(captions):
    generator = torch.Generator().manual_seed(0)
    flat = [caption for own in captions for caption in own]
    distinct = [*dict.fromkeys(flat)]
    rows = [distinct.index(caption) for caption in flat]
    found = []
    for _ in range(50):
        images = _random((len(captions), 16), generator)
        texts = _random((len(distinct), 16), generator)[rows]
        measures = retrieve(features_of(images, captions, texts)).measures()
        found.append([measure[1:3] for measure in measures])
    values, chance = np.moveaxis(np.array(found), 2, 0)  # (models, measures) each
    error = values.std(0, ddof=1) / len(found) ** 0.5
    above = values.mean(0) - chance[0]
    assert (np.abs(above[::3]) < 4 * error[::3] + 1e-6).all(), "R@1"
    assert (above < 4 * error + 1e-6).all(), "R@5 and R@10 are at most k times as high"


def test_a_linear_probe_predicts_the_most_frequent_class():
    generator = torch.Generator().manual_seed(0)
    labels, splits = torch.from_numpy(UNEQUAL), ("train", "validation", "test")
    parts = {each: Labeled(_random((120, 16), generator)[:, :2], labels) for each in splits}
    top1, per_class = probe(parts, 12).measures()
    assert top1.chance == pytest.approx(70 / 120)
    assert top1.value == pytest.approx(top1.chance, abs=0.05)
    assert per_class.chance == pytest.approx(1 / 12)
