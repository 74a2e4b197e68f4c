"""The sweep against all 97 values, and the probe against scikit-learn from end to end."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from declip.evaluation.probes import linear as module
from declip.evaluation.probes.data import Labeled, ProbeData, by_class, score, stratified
from declip.evaluation.probes.few_shot import few_shot_probe
from declip.evaluation.probes.linear import GRID, linear_probe, sweep
from declip.evaluation.probes.logistic import Classifier, LogisticProblem


@pytest.fixture(scope="module")
def data() -> ProbeData:
    """Real pictures of digits at 4 x 4 pixels, so that the probe has something to get wrong."""
    pixels, labels = load_digits(return_X_y=True)
    small = pixels.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 8
    rows = Labeled(torch.tensor(small, dtype=torch.float32), torch.tensor(labels))
    parts = [rows.take(np.arange(start, 900, 3)) for start in range(3)]
    return ProbeData("digits", 10, *parts)


def test_the_grid_is_clips() -> None:
    assert len(GRID) == 97
    np.testing.assert_allclose(sorted(GRID.values()), np.logspace(-6, 6, 97))


def test_the_sweep_is_as_good_as_trying_all(data) -> None:
    problem = LogisticProblem(data.train.features, data.train.labels)
    best, points = sweep(problem, data)
    tried = [point.C for point in points]
    assert len(tried) <= 15
    assert set(tried) >= {1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6}
    everything, found = {}, None
    for C in GRID.values():
        found = problem.fit(C, start=found)
        everything[C] = float((found.predict(data.validation.features) == data.validation.labels).double().mean())
    for point in points:
        assert point.score == pytest.approx(everything[point.C], abs=1.01 / 300)  # one image near the border
        assert point.converged or point.C >= 1e4  # there rounding may end the search a little before the tolerance
    # A validation set of 300 gives several peaks; the highest may lie where the halving does not look.
    assert max(point.score for point in points) >= max(everything.values()) - 2.01 / 300
    assert best.C in tried
    assert [point.score for point in points if point.C == best.C] == [max(point.score for point in points)]


@pytest.mark.parametrize("peak", [-48, -41, -17, -1, 0, 5, 23, 47, 48])
def test_one_peak_is_found_wherever_it_is(monkeypatch, data, peak) -> None:
    steps = {C: step for step, C in GRID.items()}
    scores = {C: 1 - abs(step - peak) / 100 for C, step in steps.items()}
    best, points = _swept(monkeypatch, data, scores)
    assert steps[best.C] == peak
    # A grid of sixteenths, then the halves of the interval around the peak, nothing else.
    assert len(points) <= 15
    assert [point.C for point in points] == sorted(point.C for point in points)


def test_of_equal_scores_the_smaller_cross_entropy_wins(monkeypatch, data) -> None:
    losses = {C: abs(step - 7) for step, C in GRID.items()}
    best, _ = _swept(monkeypatch, data, dict.fromkeys(GRID.values(), 0.5), losses)
    assert best.C == 10 ** (7 / 8)


def test_of_what_is_equal_in_all_the_stronger_penalty_wins(monkeypatch, data) -> None:
    best, _ = _swept(monkeypatch, data, dict.fromkeys(GRID.values(), 0.5))
    assert best.C == 1e-6


def test_a_fit_starts_at_the_nearest_one_below(monkeypatch, data) -> None:
    starts = []

    class Watched:
        def fit(self, C, start=None):
            starts.append((C, None if start is None else start.C))
            return _classifier(C)

    scores = {C: -abs(step - 3) for step, C in GRID.items()}
    monkeypatch.setattr(module, "_point", lambda found, data: _point(found.C, scores[found.C]))
    sweep(Watched(), data)
    assert starts[:3] == [(GRID[-48], None), (GRID[-32], GRID[-48]), (GRID[-16], GRID[-32])]
    assert (GRID[8], GRID[0]) in starts
    assert (GRID[4], GRID[0]) in starts


def test_the_probe_is_scikit_learns_on_train_and_validation(data) -> None:
    result = linear_probe(data)
    both = data.train.join(data.validation)
    theirs = LogisticRegression(C=result.C, max_iter=20_000, tol=1e-8)
    theirs.fit(both.features.double().numpy(), both.labels.numpy())
    predicted, labels = theirs.predict(data.test.features.numpy()), data.test.labels.numpy()
    assert result.top1 == pytest.approx((predicted == labels).mean())
    own = [(predicted[labels == c] == c).mean() for c in range(10)]
    assert result.mean_per_class == pytest.approx(np.mean(own))
    assert 0.8 < result.top1 < 0.97
    assert (result.n, result.train, result.classes, result.chance, result.width) == (300, 600, 10, 0.1, 16)
    assert result.converged
    assert result.validation == "validation split"
    assert result.C in [point.C for point in result.sweep]


def test_the_test_images_choose_nothing(data) -> None:
    wrong = Labeled(data.test.features, (data.test.labels + 1) % 10)
    spoiled = linear_probe(ProbeData("digits", 10, data.train, data.validation, wrong))
    assert spoiled.sweep == linear_probe(data).sweep
    assert spoiled.top1 < 0.1


def test_a_class_with_validation_images_only(data) -> None:
    none = data.train.take(data.train.labels != 4)
    result = linear_probe(ProbeData("digits", 10, none, data.validation, data.test))
    assert result.top1 > 0.8
    assert max(point.score for point in result.sweep) < 0.9  # no 4 is right before the last fit


def test_the_metric_of_the_set_chooses(data) -> None:
    rows = data.validation.take(np.sort(np.concatenate([np.flatnonzero(data.validation.labels > 0), [0]])))
    by_class_ = ProbeData("digits", 10, data.train, rows, data.test, metric="mean_per_class")
    best, points = sweep(LogisticProblem(data.train.features, data.train.labels), by_class_)
    right = (best.predict(rows.features) == rows.labels).numpy()
    expected = np.mean([right[rows.labels.numpy() == c].mean() for c in np.unique(rows.labels)])
    assert max(point.score for point in points) == pytest.approx(expected)
    assert right.mean() != pytest.approx(expected)


def test_scores_by_hand() -> None:
    right, labels = np.array([True, True, False, True, False]), np.array([0, 0, 0, 3, 5])
    assert score(right, labels) == pytest.approx(3 / 5)
    assert score(right, labels, "mean_per_class") == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_a_stratified_fifth() -> None:
    labels = np.repeat([0, 1, 2, 3, 4], [10, 3, 2, 1, 100])[np.random.default_rng(0).permutation(116)]
    drawn = stratified(labels)
    assert np.bincount(labels[drawn], minlength=5).tolist() == [2, 1, 1, 0, 20]
    assert (stratified(labels) == drawn).all()
    assert (stratified(labels, seed=1) != drawn).any()


def test_places_by_class() -> None:
    assert [places.tolist() for places in by_class(np.array([2, 0, 2, 5]))] == [[1], [0, 2], [3]]


def _classifier(C: float) -> Classifier:
    return Classifier(torch.zeros(2, 1), torch.zeros(2), torch.arange(2), C, 0.0, 1, True)


def _point(C: float, value: float, loss: float = 0.0) -> module.SweepPoint:
    return module.SweepPoint(C, value, loss, 1, True)


def _swept(monkeypatch, data, scores, losses=None) -> tuple[Classifier, list[module.SweepPoint]]:
    """The sweep over given scores, without any fit."""

    class Known:
        def fit(self, C, start=None):
            return _classifier(C)

    losses = losses or dict.fromkeys(scores, 0.0)
    monkeypatch.setattr(module, "_point", lambda found, data: _point(found.C, scores[found.C], losses[found.C]))
    return sweep(Known(), data)


def test_nan_loses(data) -> None:
    broken = replace(data, test=Labeled(torch.full_like(data.test.features, float("nan")), data.test.labels))
    assert linear_probe(broken).top1 == 0.0
    assert [run.mean for run in few_shot_probe(broken, (2,), seeds=1).runs] == [0.0]
