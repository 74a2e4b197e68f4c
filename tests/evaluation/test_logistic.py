"""The solver against scikit-learn's, and its loss against the definition."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from conftest import refuses
from declip.evaluation import linear_probe
from declip.evaluation.linear_probe import LogisticProblem


@pytest.fixture(scope="module")
def digits():
    """Real images of digits, 64 pixels each, brought to about unit size; 600 of them."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels[:600] / 8, dtype=torch.float32), torch.tensor(labels[:600])


@pytest.mark.parametrize(("C", "block"), [(1e-3, 7_000), (0.1, 200), (10.0, 1 << 20)])
def test_the_minimum_is_scikit_learns_whatever_the_block(digits, monkeypatch, C, block):
    monkeypatch.setattr(linear_probe, "BLOCK", block)
    features, labels = digits
    theirs = LogisticRegression(C=C, max_iter=20_000, tol=1e-8).fit(features.double().numpy(), labels.numpy())
    ours = LogisticProblem(features, labels, dtype=torch.float64).fit(C, tolerance=1e-6)
    assert ours.converged
    size = np.abs(theirs.coef_).max()
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=2e-4 * size)
    np.testing.assert_allclose(ours.bias - ours.bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-3)
    chances = ours.scores(features.double()).softmax(1)
    np.testing.assert_allclose(chances, theirs.predict_proba(features.double().numpy()), atol=2e-5)
    assert (ours.measure(features, labels)[0] == (theirs.predict(features.numpy()) == labels.numpy())).all()


# At the last C the loss is 2e-5: 1 - p would have no digit left in float32.
@pytest.mark.parametrize(("C", "near"), [(1e-3, 2e-5), (1.0, 2e-5), (100.0, 2e-5), (1e5, 1e-3)])
def test_single_precision_finds_the_same_minimum(digits, C, near):
    features, labels = digits
    exact = LogisticProblem(features, labels, dtype=torch.float64).fit(C, tolerance=1e-6)
    quick = LogisticProblem(features, labels).fit(C)
    assert quick.converged
    again = LogisticProblem(features, labels).fit(C, start=quick)
    assert again.iterations <= max(3, quick.iterations // 2)
    assert _objective(features, labels, quick, C) == pytest.approx(_objective(features, labels, exact, C), rel=near)
    difference = quick.scores(features.double()).softmax(1) - exact.scores(features.double()).softmax(1)
    assert float(difference.abs().max()) < 2e-3


def test_two_classes_are_scikit_learns_one_vector(digits):
    features, labels = (part[digits[1] < 2] for part in digits)
    theirs = LogisticRegression(C=0.05, max_iter=20_000, tol=1e-8).fit(features.double().numpy(), labels.numpy())
    ours = LogisticProblem(features, labels, dtype=torch.float64).fit(0.05, tolerance=1e-6)
    np.testing.assert_allclose(ours.weight[1] - ours.weight[0], theirs.coef_[0], atol=1e-4)
    assert float(ours.bias[1] - ours.bias[0]) == pytest.approx(theirs.intercept_[0], abs=1e-3)


@pytest.mark.parametrize("allowed", [3, 25])
def test_out_of_iterations_is_said(digits, allowed):
    found = LogisticProblem(*digits).fit(100.0, max_iterations=allowed)
    assert not found.converged
    assert found.iterations == allowed


def test_classes_without_images_are_never_predicted(digits):
    features, labels = digits
    kept = (labels == 3) | (labels == 7) | (labels == 8)
    found = LogisticProblem(features[kept], labels[kept]).fit(1.0)
    assert found.present.tolist() == [3, 7, 8]
    right, loss = found.measure(features.double(), labels)
    assert right[kept].mean() > 0.97
    assert not right[~kept].any()
    chances = found.scores(features.double()).softmax(1)
    by_hand = -chances[kept, torch.searchsorted(found.present, labels[kept])].log().mean()
    assert loss == pytest.approx(float(by_hand))
    right, loss = found.measure(torch.full_like(features, torch.nan)[~kept], labels[~kept])
    assert not right.any()
    assert loss == 0
    assert not found.measure(torch.full_like(features, torch.nan), labels)[0].any()


def test_what_cannot_be_fitted(digits):
    features, labels = digits
    refuses("at least two classes", LogisticProblem, features[labels == 1], labels[labels == 1])
    spoiled = features.clone()
    spoiled[3, 5] = torch.nan
    refuses("not a number", LogisticProblem, spoiled, labels)


def _objective(features, labels, found, C):
    return found.measure(features.double(), labels)[1] + float(found.weight.square().sum()) / (2 * C * len(labels))
