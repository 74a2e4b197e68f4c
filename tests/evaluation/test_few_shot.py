"""Draws by seed, what they may not touch, and a fit against scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from declip.errors import UserError
from declip.evaluation.probes import few_shot
from declip.evaluation.probes.data import Labeled, ProbeData
from declip.evaluation.probes.few_shot import draw, few_shot_probe


@pytest.fixture(scope="module")
def data() -> ProbeData:
    pixels, labels = load_digits(return_X_y=True)
    rows = Labeled(torch.tensor(pixels / 8, dtype=torch.float32), torch.tensor(labels))
    parts = [rows.take(np.arange(*span)) for span in ((0, 300), (300, 500), (500, 900))]
    return ProbeData("digits", 10, *parts)


def test_a_draw_has_so_many_of_each_class_and_grows(data) -> None:
    few, more = draw(data.train, 2, seed=0), draw(data.train, 5, seed=0)
    assert torch.bincount(few.labels).tolist() == [2] * 10
    assert torch.bincount(more.labels).tolist() == [5] * 10
    rows = {tuple(row.tolist()) for row in more.features}
    assert all(tuple(row.tolist()) in rows for row in few.features)


def test_a_seed_draws_the_same_and_another_draws_others(data) -> None:
    assert torch.equal(draw(data.train, 2, seed=1).features, draw(data.train, 2, seed=1).features)
    assert not torch.equal(draw(data.train, 2, seed=1).features, draw(data.train, 2, seed=2).features)


def test_the_same_call_gives_the_same_result(data) -> None:
    first, second = (few_shot_probe(data, (2,), seeds=2) for _ in range(2))
    assert first == second
    assert first.runs[0].scores[0] != first.runs[0].scores[1]
    assert few_shot_probe(data, (2,), seeds=3).runs[0].scores[:2] == first.runs[0].scores


def test_the_score_is_scikit_learns_on_the_images_drawn(data) -> None:
    run = few_shot_probe(data, (4,), seeds=2).runs[0]
    for seed in range(2):
        few = draw(data.train, 4, seed)
        theirs = LogisticRegression(C=run.C[seed], max_iter=20_000, tol=1e-8)
        theirs.fit(few.features.double().numpy(), few.labels.numpy())
        expected = theirs.score(data.test.features.double().numpy(), data.test.labels.numpy())
        assert run.scores[seed] == pytest.approx(expected, abs=1.01 / 400)
    assert run.mean == pytest.approx(np.mean(run.scores))
    assert run.std == pytest.approx(abs(run.scores[0] - run.scores[1]) / 2**0.5)
    assert (run.images, run.short) == (40, 0)


def test_more_images_help(data) -> None:
    result = few_shot_probe(data, (8, 1), seeds=2)
    one, eight = result.runs
    assert (one.shots, eight.shots) == (1, 8)
    assert 0.3 < one.mean < eight.mean - 0.1
    assert [measure.name.split(",")[0] for measure in result.measures()] == ["1-shot", "8-shot"]


def test_the_choice_sees_few_validation_images_and_no_test_image(monkeypatch, data) -> None:
    seen = []
    sweep = few_shot.sweep

    def watched(problem, given):
        seen.append((len(given.train), len(given.validation)))
        return sweep(problem, given)

    monkeypatch.setattr(few_shot, "sweep", watched)
    honest = few_shot_probe(data, (2, 8), seeds=1)
    assert seen == [(20, 20), (80, 40)]  # min(shots, 4) a class
    wrong = Labeled(data.test.features, (data.test.labels + 1) % 10)
    spoiled = few_shot_probe(replace(data, test=wrong), (2, 8), seeds=1)
    assert [run.C for run in spoiled.runs] == [run.C for run in honest.runs]


def test_classes_with_fewer_images_give_all_and_are_counted(data) -> None:
    order = np.arange(300)
    kept = np.sort(np.concatenate([order[data.train.labels != 7], order[data.train.labels == 7][:3]]))
    result = few_shot_probe(replace(data, train=data.train.take(kept)), (2, 3, 4), seeds=1)
    assert [(run.images, run.short) for run in result.runs] == [(20, 0), (30, 0), (39, 1)]


def test_one_seed_has_no_deviation(data) -> None:
    assert few_shot_probe(data, (1,), seeds=1).runs[0].std == 0


@pytest.mark.parametrize(("shots", "seeds"), [((), 3), ((0, 1), 3), ((1,), 0)])
def test_wrong_arguments(data, shots, seeds) -> None:
    with pytest.raises(UserError, match="one number or more"):
        few_shot_probe(data, shots, seeds)
