"""The solver against scikit-learn's, the sweep against many values, and the probe from end to end."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import Lazy, refuses
from declip.evaluation.linear_probe import Labeled, LogisticProblem, sweep
from declip.evaluation.results import by_class, sample_per_class, score
from evaluation.conftest import probe

datasets, linear_model = Lazy("sklearn.datasets"), Lazy("sklearn.linear_model")
STEPS = {10 ** (step / 8): step for step in range(-48, 49)}


@pytest.fixture(scope="module")
def data():
    """Real images of digits at 4 x 4 pixels, so that the probe has something to get wrong."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    small = pixels.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 8
    rows = Labeled(torch.tensor(small, dtype=torch.float32), torch.tensor(labels))
    return {
        which: rows.take(np.arange(start, 900, 3))
        for start, which in enumerate(("train", "validation", "test"))
    }


@pytest.fixture(scope="module")
def result(data):
    return probe(data, 10)


class KnownProblem:
    """A problem whose fits have known scores and losses, by step of the grid."""

    def __init__(self, count, right, loss=lambda step: 0.0):
        self.rows, self.right, self.loss = torch.arange(count), right, loss
        self.fits = 0

    def fit(self, C, start=None):
        assert start is None or start.C < C, "the nearest one below"
        self.fits += 1
        right, loss = self.right(STEPS[C]), self.loss(STEPS[C])
        measured = (self.rows < right if isinstance(right, int) else right).numpy(), loss
        return SimpleNamespace(C=C, measure=lambda rows: measured)


@pytest.mark.parametrize("peak", [-48, -41, 0, 5, 47, 48])
def test_one_peak_is_found_wherever_it_is(data, peak):
    problem = KnownProblem(300, lambda step: 300 - abs(step - peak))
    assert STEPS[sweep(problem, data["validation"]).C] == peak
    # A grid of sixteenths, then the halves of the interval around the peak, nothing else.
    assert problem.fits <= 15


@pytest.mark.parametrize(
    ("loss", "chosen"),
    [
        (lambda step: abs(step - 7), 7),
        (lambda step: 0.0, -48),
        (lambda step: 1.0 if step == 16 else math.nan, 16),
    ],
)
def test_of_equal_scores_the_smaller_cross_entropy_wins_and_then_the_stronger_penalty(
    data, loss, chosen
):
    assert STEPS[sweep(KnownProblem(300, lambda step: 150, loss), data["validation"]).C] == chosen


@pytest.mark.parametrize(("metric", "chosen"), [("top1", 0), ("mean_per_class", 16)])
def test_the_metric_of_the_set_chooses(metric, chosen):
    labels = torch.tensor([0] * 8 + [1] * 2)
    right = {0: labels == 0, 16: torch.arange(10) >= 3}
    uneven = Labeled(torch.zeros(10, 16), labels)
    problem = KnownProblem(10, lambda step: right.get(step, 0))
    assert STEPS[sweep(problem, uneven, metric).C] == chosen


def test_the_probe_is_scikit_learns_on_train_and_validation(data, result):
    both = (
        torch.cat(parts).double().numpy()
        for parts in zip(data["train"], data["validation"], strict=True)
    )
    theirs = linear_model.LogisticRegression(C=result.C, max_iter=20_000, tol=1e-8).fit(*both)
    predicted, labels = theirs.predict(data["test"].features.numpy()), data["test"].labels.numpy()
    assert result.top1 == pytest.approx((predicted == labels).mean())
    own = [(predicted[labels == c] == c).mean() for c in range(10)]
    assert result.mean_per_class == pytest.approx(np.mean(own))
    assert 0.8 < result.top1 < 0.97
    assert (result.n, result.train, result.classes, result.width) == (300, 600, 10, 16)
    assert result.chance == 0.1
    assert (result.converged, result.validation) == (True, "validation split")


def test_a_class_with_validation_images_only_and_test_images_that_choose_nothing(data):
    few = {which: rows.take(rows.labels < 3) for which, rows in data.items()}
    few["train"] = few["train"].take(few["train"].labels < 2)
    result = probe(few, 3)
    assert result.top1 > 0.8
    spoiled = probe({**few, "test": few["test"]._replace(labels=(few["test"].labels + 1) % 3)}, 3)
    assert spoiled.C == result.C
    assert spoiled.top1 < 0.2


def test_scores_and_samples_by_class():
    right, labels = np.array([True, True, False, True, False]), np.array([0, 0, 0, 3, 5])
    assert score(right, labels) == pytest.approx(3 / 5)
    assert score(right, labels, "mean_per_class") == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert [places.tolist() for places in by_class(np.array([2, 0, 2, 5]))] == [[1], [0, 2], [3]]
    labels = np.repeat([0, 1, 2, 3, 4], [10, 3, 2, 1, 100])[
        np.random.default_rng(0).permutation(116)
    ]
    half = sample_per_class(labels, lambda count: count // 2)
    assert np.bincount(labels[half], minlength=5).tolist() == [5, 1, 1, 0, 50]
    assert (sample_per_class(labels, lambda count: count // 2, seed=1) != half).any()
    assert sample_per_class(labels, lambda size: 50)[half].all()


@pytest.fixture(scope="module")
def digits():
    """Real images of digits, 64 pixels each, brought to about unit size; 600 of them."""
    pixels, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(pixels[:600] / 8, dtype=torch.float32), torch.tensor(labels[:600])


@pytest.mark.parametrize(("C", "block"), [(1e-3, 7_000), (0.1, 200), (10.0, 1 << 20)])
def test_the_minimum_is_scikit_learns_whatever_the_block(digits, monkeypatch, C, block):
    monkeypatch.setattr("declip.evaluation.linear_probe.BLOCK", block)
    features, labels = digits
    theirs = linear_model.LogisticRegression(C=C, max_iter=20_000, tol=1e-8).fit(
        features.double().numpy(), labels.numpy()
    )
    ours = LogisticProblem(features.double(), labels).fit(C, tolerance=1e-14)
    assert ours.converged
    size = np.abs(theirs.coef_).max()
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=2e-4 * size)
    bias, intercept = (each - each.mean() for each in (ours.bias, theirs.intercept_))
    np.testing.assert_allclose(bias, intercept, atol=1e-3)
    chances = ours.scores(features.double()).softmax(1)
    np.testing.assert_allclose(chances, theirs.predict_proba(features.double().numpy()), atol=2e-5)
    right, _ = ours.measure(Labeled(features, labels))
    assert np.array_equal(right, theirs.predict(features.numpy()) == labels.numpy())


# At the last C the loss is 2e-5: 1 - p would have no digit left in float32.
@pytest.mark.parametrize(("C", "near"), [(1e-3, 2e-5), (1.0, 2e-5), (100.0, 2e-5), (1e5, 1e-3)])
def test_single_precision_finds_the_same_minimum(digits, C, near):
    features, labels = digits
    exact = LogisticProblem(features.double(), labels).fit(C, tolerance=1e-14)
    quick = LogisticProblem(features, labels).fit(C)
    assert quick.converged
    again = LogisticProblem(features, labels).fit(C, start=quick)
    assert again.iterations <= max(3, quick.iterations // 2)
    least, found = (_objective(features, labels, each, C) for each in (exact, quick))
    assert found == pytest.approx(least, rel=near)
    chances = [each.scores(features.double()).softmax(1) for each in (quick, exact)]
    torch.testing.assert_close(*chances, rtol=0, atol=2e-3)


def test_classes_without_images_are_never_predicted(digits):
    features, labels = digits
    kept = (labels == 3) | (labels == 7) | (labels == 8)
    found = LogisticProblem(features[kept], labels[kept]).fit(1.0)
    assert found.present.tolist() == [3, 7, 8]
    right, loss = found.measure(Labeled(features.double(), labels))
    assert right[kept].mean() > 0.97
    assert not right[~kept].any()
    chances = found.scores(features.double()).softmax(1)
    by_hand = -chances[kept, torch.searchsorted(found.present, labels[kept])].log().mean()
    assert loss == pytest.approx(float(by_hand))
    right, loss = found.measure(Labeled(torch.full_like(features, torch.nan)[~kept], labels[~kept]))
    assert not right.any()
    assert loss == 0
    assert not found.measure(Labeled(torch.full_like(features, torch.nan), labels))[0].any()


def test_what_cannot_be_fitted(digits):
    features, labels = digits
    refuses("at least two classes", LogisticProblem, features[labels == 1], labels[labels == 1])
    spoiled = features.clone()
    spoiled[3, 5] = torch.nan
    refuses("not a number", LogisticProblem, spoiled, labels)


def _objective(features, labels, found, C):
    _, loss = found.measure(Labeled(features.double(), labels))
    return loss + float(found.weight.square().sum()) / (2 * C * len(labels))
