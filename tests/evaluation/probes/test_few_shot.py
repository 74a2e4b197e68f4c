"""Samples by seed, images that they may not touch, and a fit against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from declip.errors import UserError
from declip.evaluation.probes.data import Labeled, ProbeData
from declip.evaluation.probes.few_shot import few_shot_probe, sample
from declip.evaluation.results import FewShotResult


@pytest.fixture(scope="module")
def data() -> ProbeData:
    pixels, labels = load_digits(return_X_y=True)
    rows = Labeled(torch.tensor(pixels / 8, dtype=torch.float32), torch.tensor(labels))
    parts = [rows.take(np.arange(*span)) for span in ((0, 300), (300, 500), (500, 900))]
    return ProbeData("digits", 10, *parts)


@pytest.fixture(scope="module")
def result(data) -> FewShotResult:
    return few_shot_probe(data, (4, 1), seeds=2)


def test_a_sample_has_so_many_of_each_class_by_its_seed_and_grows(data) -> None:
    few, more = sample(data.train, 2, seed=0), sample(data.train, 5, seed=0)
    assert torch.bincount(few.labels).tolist() == [2] * 10
    assert torch.bincount(more.labels).tolist() == [5] * 10
    rows = {tuple(row.tolist()) for row in more.features}
    assert all(tuple(row.tolist()) in rows for row in few.features)
    assert torch.equal(few.features, sample(data.train, 2, seed=0).features)
    assert not torch.equal(few.features, sample(data.train, 2, seed=1).features)


def test_more_seeds_keep_the_scores_of_fewer(data, result) -> None:
    scores = result.runs[0].scores
    assert scores[0] != scores[1]
    assert few_shot_probe(data, (1,), seeds=3).runs[0].scores[:2] == scores


def test_the_score_is_scikit_learns_on_the_images_sampled(data, result) -> None:
    run = result.runs[1]
    for seed in range(2):
        few = sample(data.train, 4, seed)
        theirs = LogisticRegression(C=run.C[seed], max_iter=20_000, tol=1e-8)
        theirs.fit(few.features.double().numpy(), few.labels.numpy())
        expected = theirs.score(data.test.features.double().numpy(), data.test.labels.numpy())
        assert run.scores[seed] == pytest.approx(expected, abs=1.01 / 400)
    assert run.mean == pytest.approx(np.mean(run.scores))
    assert run.std == pytest.approx(abs(run.scores[0] - run.scores[1]) / 2**0.5)
    assert (run.images, run.short) == (40, 0)


def test_more_images_help(result) -> None:
    one, four = result.runs
    assert (one.shots, four.shots) == (1, 4)
    assert 0.3 < one.mean < four.mean - 0.05
    assert [measure.name.split(",")[0] for measure in result.measures()] == ["1-shot", "4-shot"]


def test_no_test_image_chooses_and_one_seed_has_no_deviation(data, result) -> None:
    wrong = Labeled(data.test.features, (data.test.labels + 1) % 10)
    spoiled = few_shot_probe(replace(data, test=wrong), (1, 4), seeds=1)
    assert [run.C for run in spoiled.runs] == [run.C[:1] for run in result.runs]
    assert [run.std for run in spoiled.runs] == [0, 0]


def test_classes_with_fewer_images_give_all_and_are_counted(data) -> None:
    order = np.arange(300)
    kept = np.sort(np.concatenate([order[data.train.labels != 7], order[data.train.labels == 7][:3]]))
    fewer = few_shot_probe(replace(data, train=data.train.take(kept)), (3, 4), seeds=1)
    assert [(run.images, run.short) for run in fewer.runs] == [(30, 0), (39, 1)]


@pytest.mark.parametrize(("shots", "seeds"), [((), 3), ((0, 1), 3), ((1,), 0)])
def test_wrong_arguments(data, shots, seeds) -> None:
    with pytest.raises(UserError, match="one number or more"):
        few_shot_probe(data, shots, seeds)
