"""The sweep against many values, and the probe against scikit-learn from end to end."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from declip.evaluation.probes.data import Labeled, ProbeData, by_class, score, stratified
from declip.evaluation.probes.linear import GRID, is_right, linear_probe, sweep
from declip.evaluation.probes.logistic import LogisticProblem
from declip.evaluation.results import LinearProbeResult


@pytest.fixture(scope="module")
def data() -> ProbeData:
    """Real images of digits at 4 x 4 pixels, so that the probe has something to get wrong."""
    pixels, labels = load_digits(return_X_y=True)
    small = pixels.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 8
    rows = Labeled(torch.tensor(small, dtype=torch.float32), torch.tensor(labels))
    parts = [rows.take(np.arange(start, 900, 3)) for start in range(3)]
    return ProbeData("digits", 10, *parts)


def test_the_grid_is_clips() -> None:
    assert len(GRID) == 97
    np.testing.assert_allclose(sorted(GRID.values()), np.logspace(-6, 6, 97))


def test_the_sweep_is_as_good_as_trying_many(data) -> None:
    problem = LogisticProblem(data.train.features, data.train.labels)
    best, points = sweep(problem, data)
    scores = {point.C: point.score for point in points}
    assert len(scores) <= 15
    assert set(scores) >= {1e-6, 1e-4, 1e-2, 1.0, 1e2, 1e4, 1e6}
    others, fitted = {}, None
    for step in range(-24, 25, 4):
        fitted = problem.fit(GRID[step], start=fitted)
        others[GRID[step]] = float(is_right(fitted, data.validation, data).mean())
    for C in scores.keys() & others.keys():
        assert scores[C] == pytest.approx(others[C], abs=1.01 / 300)  # one image near the border
    # Rounding may end the search a little before the tolerance where the penalty is weak.
    assert all(point.converged or point.C >= 1e4 for point in points)
    # A validation set of 300 gives several peaks; the highest may lie where the halving does not look.
    assert max(scores.values()) >= max(others.values()) - 2.01 / 300
    assert scores[best.C] == max(scores.values())


@dataclass
class Known:
    """A classifier that is right on the first `right` validation images."""

    C: float
    labels: torch.Tensor
    right: int
    loss: float = 0.0
    iterations: int = 1
    converged: bool = True

    def predict(self, features: torch.Tensor) -> torch.Tensor:
        return self.labels.where(torch.arange(len(self.labels)) < self.right, -1)

    def cross_entropy(self, features: torch.Tensor, labels: torch.Tensor) -> float:
        return self.loss


class KnownProblem:
    """A problem whose fits have known scores and losses, by step of the grid; it remembers where fits started."""

    def __init__(self, data: ProbeData, right: Callable[[int], int], loss: Callable[[int], float] = lambda step: 0.0):
        self.labels, self.right, self.loss = data.validation.labels, right, loss
        self.starts: list[tuple[float, float | None]] = []

    def fit(self, C: float, start: Known | None = None) -> Known:
        self.starts.append((C, None if start is None else start.C))
        return Known(C, self.labels, self.right(STEPS[C]), self.loss(STEPS[C]))


STEPS = {C: step for step, C in GRID.items()}


@pytest.mark.parametrize("peak", [-48, -41, -17, -1, 0, 5, 23, 47, 48])
def test_one_peak_is_found_wherever_it_is(data, peak) -> None:
    best, points = sweep(KnownProblem(data, lambda step: 300 - abs(step - peak)), data)
    assert STEPS[best.C] == peak
    # A grid of sixteenths, then the halves of the interval around the peak, nothing else.
    assert len(points) <= 15
    assert [point.C for point in points] == sorted(point.C for point in points)


def test_of_equal_scores_the_smaller_cross_entropy_wins_and_then_the_stronger_penalty(data) -> None:
    best, _ = sweep(KnownProblem(data, lambda step: 150, lambda step: abs(step - 7)), data)
    assert best.C == 10 ** (7 / 8)
    best, _ = sweep(KnownProblem(data, lambda step: 150), data)
    assert best.C == 1e-6


def test_a_fit_starts_at_the_nearest_one_below(data) -> None:
    problem = KnownProblem(data, lambda step: 300 - abs(step - 3))
    sweep(problem, data)
    assert problem.starts[:3] == [(GRID[-48], None), (GRID[-32], GRID[-48]), (GRID[-16], GRID[-32])]
    assert {(GRID[8], GRID[0]), (GRID[4], GRID[0])} <= set(problem.starts)


@pytest.fixture(scope="module")
def result(data) -> LinearProbeResult:
    return linear_probe(data)


def test_the_probe_is_scikit_learns_on_train_and_validation(data, result) -> None:
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


def test_the_test_images_choose_nothing(data, result) -> None:
    wrong = Labeled(data.test.features, (data.test.labels + 1) % 10)
    spoiled = linear_probe(ProbeData("digits", 10, data.train, data.validation, wrong))
    assert spoiled.sweep == result.sweep
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
    chosen = stratified(labels)
    assert np.bincount(labels[chosen], minlength=5).tolist() == [2, 1, 1, 0, 20]
    assert (stratified(labels) == chosen).all()
    assert (stratified(labels, seed=1) != chosen).any()


def test_places_by_class() -> None:
    assert [places.tolist() for places in by_class(np.array([2, 0, 2, 5]))] == [[1], [0, 2], [3]]
