"""Samples by seed, images that they may not touch, and a fit against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from declip.errors import UserError
from declip.evaluation.probes.data import Labeled, ProbeData
from declip.evaluation.probes.linear import few_shot_probe, sample
from declip.evaluation.results import FewShotResult


@pytest.fixture(scope="module")
def data() -> ProbeData:
    """Six digits at 4 x 4 pixels."""
    pixels, labels = load_digits(n_class=6, return_X_y=True)
    small = pixels.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 8
    rows = Labeled(torch.tensor(small, dtype=torch.float32), torch.tensor(labels))
    parts = [rows.take(np.arange(*span)) for span in ((0, 200), (200, 300), (300, 700))]
    return ProbeData("digits", 6, *parts)


@pytest.fixture(scope="module")
def result(data) -> FewShotResult:
    return few_shot_probe(data, (4, 1), seeds=2)


def test_the_score_is_scikit_learns_on_the_images_sampled(data, result) -> None:
    one, four = result.runs
    for seed in range(2):
        few = sample(data.train, 4, seed)
        theirs = LogisticRegression(C=four.C[seed], max_iter=20_000, tol=1e-8)
        theirs.fit(few.features.double().numpy(), few.labels.numpy())
        expected = theirs.score(data.test.features.double().numpy(), data.test.labels.numpy())
        assert four.scores[seed] == pytest.approx(expected, abs=2.01 / 400)  # images near a border
    assert four.mean == pytest.approx(np.mean(four.scores))
    assert four.std == pytest.approx(abs(four.scores[0] - four.scores[1]) / 2**0.5)
    assert (one.shots, one.images, four.shots, four.images, four.short) == (1, 6, 4, 24, 0)
    assert 0.3 < one.mean < four.mean - 0.05
    assert one.scores[0] != one.scores[1]


def test_no_test_image_chooses_and_classes_with_fewer_images_give_all(data, result) -> None:
    wrong = Labeled(data.test.features, (data.test.labels + 1) % 6)
    (run,) = few_shot_probe(replace(data, test=wrong), (4,), seeds=1).runs
    assert (run.C, run.std) == (result.runs[1].C[:1], 0)
    kept = np.r_[np.flatnonzero(data.train.labels != 5), np.flatnonzero(data.train.labels == 5)[:3]]
    (run,) = few_shot_probe(replace(data, train=data.train.take(np.sort(kept))), (4,), seeds=1).runs
    assert (run.images, run.short) == (23, 1)


@pytest.mark.parametrize(("shots", "seeds"), [((), 3), ((0, 1), 3), ((1,), 0)])
def test_wrong_arguments(data, shots, seeds) -> None:
    with pytest.raises(UserError, match="one number or more"):
        few_shot_probe(data, shots, seeds)
