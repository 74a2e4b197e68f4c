"""Votes of nearest neighbors against scikit-learn, against a plain loop, and by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from declip.evaluation.probes.data import Labeled, ProbeData
from declip.evaluation.probes.knn import knn_probe, vote_ranks


@pytest.fixture(scope="module")
def data() -> ProbeData:
    """Images of digits with noise, so that neighbors differ."""
    pixels, labels = load_digits(return_X_y=True)
    noisy = pixels + 6 * np.random.default_rng(0).standard_normal(pixels.shape)
    rows = Labeled(torch.tensor(noisy, dtype=torch.float32), torch.tensor(labels))
    parts = [rows.take(np.arange(*span)) for span in ((0, 350), (350, 400), (400, 550))]
    return ProbeData("digits", 10, *parts)


def _loop(data: ProbeData, k: int) -> list[int]:
    """The rank of each test image's class, by the definition."""
    bank = data.train.join(data.validation)
    rows, queries = (part.features.double().numpy() for part in (bank, data.test))
    rows, queries = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in (rows, queries))
    ranks = []
    for query, own in zip(queries, data.test.labels.tolist(), strict=True):
        cosines = [float(query @ row) for row in rows]
        votes = [0.0] * data.classes
        for place in sorted(range(len(rows)), key=lambda row: -cosines[row])[:k]:
            votes[int(bank.labels[place])] += math.exp(cosines[place] / 0.07)
        ranks.append(sum(vote >= votes[own] for vote in votes))
    return ranks


@pytest.mark.parametrize("block", [1, 1 << 25])
def test_weighted_votes_equal_a_loop_whatever_the_block(data, block) -> None:
    found = knn_probe(data, (5, 40), block=block)
    for vote in found.votes:
        ranks = np.array(_loop(data, vote.k))
        labels = data.test.labels.numpy()
        assert vote.top1 == pytest.approx((ranks == 1).mean())
        assert vote.top5 == pytest.approx((ranks <= 5).mean())
        assert vote.mean_per_class == pytest.approx(np.mean([(ranks[labels == c] == 1).mean() for c in range(10)]))
    assert 0.5 < found.votes[0].top1 < 0.99
    assert found.votes[0].top1 != found.votes[1].top1


def test_every_k_up_to_the_number_of_training_images(data) -> None:
    found = knn_probe(data)
    assert [vote.k for vote in found.votes] == [1, 10, 20, 100, 200]
    few = knn_probe(replace(data, train=data.train.take(np.arange(40)), validation=data.validation.take([0, 1])))
    assert [vote.k for vote in few.votes] == [1, 10, 20, 42]
    assert (few.train, few.n, few.chance, few.width) == (42, 150, 0.1, 64)


def test_ranks_by_hand_with_ties_against_the_class() -> None:
    weights = torch.tensor([[3.0, 2.0, 1.0], [2.0, 1.0, 1.0], [2.0, 2.0, 1.0], [1.0, 1.0, 1.0]])
    voters = torch.tensor([[0, 1, 1], [0, 1, 2], [4, 3, 0], [5, 5, 5]])
    # Row 0: 3 against 1 + 2. Row 1: 2 against 1 and 1. Row 2: class 0 is third. Row 3: class 0 has no vote.
    assert vote_ranks(weights, voters, 6)[:, 0].tolist() == [2, 1, 3, 6]


def test_ties_and_nan_lose(data) -> None:
    same = Labeled(torch.ones(50, 8), torch.arange(50) % 5)
    assert knn_probe(ProbeData("same", 5, same, same, same), (100,)).votes[0].top1 == 0  # all classes tie
    broken = replace(data, test=Labeled(torch.full_like(data.test.features, float("nan")), data.test.labels))
    assert [(vote.top1, vote.top5) for vote in knn_probe(broken, (1, 20)).votes] == [(0.0, 0.0)] * 2
    weights = torch.tensor([[float("nan"), 0.5], [1.0, float("nan")]])
    assert vote_ranks(weights, torch.tensor([[0, 1], [0, 1]]), 2)[:, 0].tolist() == [2, 2]
