"""The solver against scikit-learn's, and its loss against the definition."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from declip.errors import UserError
from declip.evaluation.probes import logistic
from declip.evaluation.probes.logistic import LogisticProblem


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Real images of digits, 64 pixels each, brought to about unit size; 600 of them."""
    pixels, labels = load_digits(return_X_y=True)
    return torch.tensor(pixels[:600] / 8, dtype=torch.float32), torch.tensor(labels[:600])


@pytest.mark.parametrize("C", [1e-3, 0.1, 10.0])
def test_the_minimum_is_scikit_learns(digits, C) -> None:
    features, labels = digits
    theirs = LogisticRegression(C=C, max_iter=20_000, tol=1e-8).fit(features.double().numpy(), labels.numpy())
    ours = LogisticProblem(features, labels, dtype=torch.float64).fit(C, tolerance=1e-6)
    assert ours.converged
    size = np.abs(theirs.coef_).max()
    np.testing.assert_allclose(ours.weight, theirs.coef_, atol=2e-4 * size)
    np.testing.assert_allclose(ours.bias - ours.bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-3)
    chances = ours.scores(features.double()).softmax(1)
    np.testing.assert_allclose(chances, theirs.predict_proba(features.double().numpy()), atol=2e-5)
    assert ours.predict(features).tolist() == theirs.predict(features.numpy()).tolist()


@pytest.mark.parametrize("C", [1e-3, 1.0, 100.0])
def test_single_precision_finds_the_same_minimum(digits, C) -> None:
    features, labels = digits
    exact = LogisticProblem(features, labels, dtype=torch.float64).fit(C, tolerance=1e-6)
    quick = LogisticProblem(features, labels).fit(C)
    assert quick.converged
    assert _objective(features, labels, quick, C) == pytest.approx(_objective(features, labels, exact, C), rel=2e-5)
    difference = quick.scores(features.double()).softmax(1) - exact.scores(features.double()).softmax(1)
    assert float(difference.abs().max()) < 2e-3


def test_two_classes_are_scikit_learns_one_vector(digits) -> None:
    features, labels = (part[digits[1] < 2] for part in digits)
    theirs = LogisticRegression(C=0.05, max_iter=20_000, tol=1e-8).fit(features.double().numpy(), labels.numpy())
    ours = LogisticProblem(features, labels, dtype=torch.float64).fit(0.05, tolerance=1e-6)
    np.testing.assert_allclose(ours.weight[1] - ours.weight[0], theirs.coef_[0], atol=1e-4)
    assert float(ours.bias[1] - ours.bias[0]) == pytest.approx(theirs.intercept_[0], abs=1e-3)


def test_loss_and_gradient_of_the_definition_whatever_the_block(monkeypatch, digits) -> None:
    features, labels = digits[0][:50], digits[1][:50]
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(10, 64, generator=generator, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(10, generator=generator, dtype=torch.float64, requires_grad=True)
    centered = features.double() - features.double().mean(0)
    scores = centered @ weight.T + bias
    by_hand = sum(torch.logsumexp(scores[i], 0) - scores[i, labels[i]] for i in range(50)) / 50
    by_hand = by_hand + 0.3 * (weight**2).sum() / 2
    by_hand.backward()
    for block in (10, 70, 100_000):
        monkeypatch.setitem(logistic.BLOCK, "cpu", block)
        problem = LogisticProblem(features.double(), labels, dtype=torch.float64)
        value, of_weight, of_bias = problem.loss(weight.detach(), bias.detach(), 0.3)
        assert value == pytest.approx(by_hand.item())
        np.testing.assert_allclose(of_weight, weight.grad, atol=1e-12)
        np.testing.assert_allclose(of_bias, bias.grad, atol=1e-12)


def test_single_precision_keeps_the_digits_of_a_tiny_loss(digits) -> None:
    features, labels = digits
    problem, exact = (LogisticProblem(features, labels, dtype=dtype) for dtype in (torch.float32, torch.float64))
    fitted = exact.fit(1e5)
    weight, bias = fitted.weight, fitted.bias + fitted.weight @ exact.mean
    (value, of_weight, _), (true, true_weight, _) = (each.loss(weight, bias, 0.0) for each in (problem, exact))
    assert true < 1e-3
    assert value == pytest.approx(true, rel=1e-3)
    assert float((of_weight - true_weight).abs().max()) < 1e-3 * float(true_weight.abs().max())


def test_a_start_elsewhere_ends_at_the_same_minimum(digits) -> None:
    problem = LogisticProblem(*digits, dtype=torch.float64)
    there = problem.fit(1.0, tolerance=1e-6)
    from_there = problem.fit(0.01, tolerance=1e-6, start=there)
    cold = problem.fit(0.01, tolerance=1e-6)
    np.testing.assert_allclose(from_there.weight, cold.weight, atol=1e-4)
    assert problem.fit(1.0, tolerance=1e-6, start=there).iterations <= 3


@pytest.mark.filterwarnings("ignore:lbfgs failed")
def test_features_far_off_and_badly_scaled(digits) -> None:
    features, labels = digits
    moved = features.double() * torch.logspace(-1, 1, 64) + 100
    ours = LogisticProblem(moved, labels, dtype=torch.float64).fit(0.1)
    theirs = LogisticRegression(C=0.1, max_iter=1000).fit(moved.numpy(), labels.numpy())
    assert ours.converged
    assert ours.iterations < 0.4 * theirs.n_iter_[0]
    assert ours.loss < _objective(moved, labels, _as_ours(theirs), 0.1)


@pytest.mark.parametrize("allowed", [3, 25])
def test_out_of_iterations_is_said(digits, allowed) -> None:
    found = LogisticProblem(*digits).fit(100.0, max_iterations=allowed)
    assert not found.converged
    assert found.iterations == allowed


def test_classes_without_images_are_never_predicted(digits) -> None:
    features, labels = digits
    kept = (labels == 3) | (labels == 7) | (labels == 8)
    found = LogisticProblem(features[kept], labels[kept]).fit(1.0)
    assert found.present.tolist() == [3, 7, 8]
    assert set(found.predict(features).tolist()) == {3, 7, 8}
    assert float((found.predict(features[kept]) == labels[kept]).double().mean()) > 0.97
    assert set(found.predict(torch.full_like(features, torch.nan)).tolist()) == {-1}


def test_cross_entropy_is_that_of_the_rows_that_can_be_right(digits) -> None:
    features, labels = digits
    found = LogisticProblem(features[labels < 5], labels[labels < 5]).fit(0.1)
    chances = found.scores(features.double()).softmax(1).numpy()
    rows = np.flatnonzero(labels.numpy() < 5)
    by_hand = -np.log(chances[rows, labels.numpy()[rows]]).mean()
    assert found.cross_entropy(features.double(), labels) == pytest.approx(by_hand)
    assert found.cross_entropy(features[labels > 5], labels[labels > 5]) == 0


def test_what_cannot_be_fitted(digits) -> None:
    features, labels = digits
    with pytest.raises(UserError, match=r"at least two classes; these .* are of 1"):
        LogisticProblem(features[labels == 1], labels[labels == 1])
    spoiled = features.clone()
    spoiled[3, 5] = torch.nan
    with pytest.raises(UserError, match="not a number"):
        LogisticProblem(spoiled, labels)


def _objective(features: torch.Tensor, labels: torch.Tensor, found: logistic.Classifier, C: float) -> float:
    loss = found.cross_entropy(features.double(), labels)
    return loss + float(found.weight.square().sum()) / (2 * C * len(labels))


def _as_ours(theirs: LogisticRegression) -> logistic.Classifier:
    weight, bias, classes = (torch.tensor(each) for each in (theirs.coef_, theirs.intercept_, theirs.classes_))
    return logistic.Classifier(weight, bias, classes, theirs.C, 0.0, 0, True)
