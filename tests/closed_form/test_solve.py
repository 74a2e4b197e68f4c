"""Ridge regression both ways against scikit-learn and plain loops."""

from itertools import product

import numpy as np
import pytest
import scipy.special
import torch

from conftest import Lazy
from declip.closed_form import regression, solve
from declip.closed_form.heads import fit_heads, regression_heads
from declip.closed_form.pairs import ClassPairs, Pairs
from declip.closed_form.regression import RegressionRows, moments, regression_rows
from declip.closed_form.solve import DEFAULT_FORM, Form, split_product
from pair_features import class_pairs, features, pairs_of, randn

linear_model = Lazy("sklearn.linear_model")


def centered(side, weights):
    rows, mean = side.numpy(), np.average(side.numpy(), axis=0, weights=weights.numpy())
    direction = mean / np.linalg.norm(mean)
    rows = rows - np.outer(rows @ direction, direction)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def both_ways(x, y, regress):
    """The sum of the regressions of one side on the other, each divided by its norm."""
    forth, back = regress(x, y), regress(y, x)
    return forth / np.linalg.norm(forth) + back.T / np.linalg.norm(back)


def plain_ridge(x, y, share, ridge):
    def regress(source, target):
        # scikit-learn sums over rows: ε times the mean eigenvalue of the weighted covariance, trace / width.
        alpha = ridge * np.trace((source * share).T @ source) / source.shape[1]
        model = linear_model.Ridge(alpha=alpha, fit_intercept=False)
        return model.fit(source, target, sample_weight=share[:, 0]).coef_.T

    return both_ways(x, y, regress)


def plain_cca(x, y, share, ridge):
    whiteners = []
    for side in (x, y):
        covariance = (side * share).T @ side
        width = len(covariance)
        damped = covariance + ridge * np.trace(covariance) / width * np.eye(width)
        whiteners.append(np.linalg.inv(damped))
    return whiteners[0] @ (x * share).T @ y @ whiteners[1]


def plain_pulled(x, y, share, ridge):
    def regress(source, target):
        covariance, cross = ((source * share).T @ side for side in (source, target))
        penalty = ridge * np.trace(covariance) / 7 * np.eye(7)
        slope = np.trace(cross) / np.trace(covariance)
        return np.linalg.inv(covariance + penalty) @ (cross + penalty * slope)

    return both_ways(x, y, regress)


PLAIN = {"ridge": plain_ridge, "cca": plain_cca, "pulled": plain_pulled}


@pytest.mark.parametrize(("method", "ridge"), [*product(PLAIN, (0.1, 3.0)), ("pulled", 1e9)])
def test_heads_are_those_of_scikit_learn_and_plain_algebra(method, ridge):
    images, texts = features(40)
    if method == "pulled":
        images = images[:, :7] + texts  # embeddings in one space
    weights = torch.linspace(0.5, 2.0, 40, dtype=torch.float64)
    x, direction = regression.centered(images, weights @ images)
    rows = RegressionRows(x, texts, torch.arange(40), weights, direction)
    heads = regression_heads(rows, Form(method, ridge))
    x = centered(images, weights)
    y = centered(texts, weights)
    share = (weights / weights.sum()).numpy()[:, None]
    found = x @ (heads.image.mT @ heads.text).numpy() @ y.T
    expected = x @ PLAIN[method](x, y, share, ridge) @ y.T
    np.testing.assert_allclose(found, expected, atol=1e-8)
    if ridge == 1e9:  # the cosines of the start, up to a factor
        np.testing.assert_allclose(found, x @ y.T * 2 / 7**0.5, atol=1e-6)


@pytest.mark.parametrize("count", [3, 40])  # fewer rows than columns, and more
@pytest.mark.parametrize("method", ["ridge", "cca"])
def test_class_posteriors_are_features_too(method, count):
    pairs, classes = pairs_of(8), class_pairs(count)
    heads = fit_heads(pairs, classes, 0.5, Form(method, 0.3))
    direction = (10 * classes.mean + pairs.images.sum(dim=0)).numpy()
    direction /= np.linalg.norm(direction)

    def features_of(rows, posteriors):
        rest = rows.numpy() - np.outer(rows.numpy() @ direction, direction)
        return np.hstack([rest / np.linalg.norm(rest, axis=1, keepdims=True), posteriors])

    posteriors = scipy.special.softmax((pairs.images @ classes.rows.mT).numpy(), axis=1)
    own = features_of(pairs.images, posteriors**0.7)
    x = np.vstack([own, features_of(classes.rows - classes.rows.mean(dim=0), np.eye(count))])
    weights = torch.tensor([1.0] * 8 + [0.5] * count, dtype=torch.float64)
    y = centered(torch.cat([pairs.texts, classes.texts]), weights)
    share = (weights / weights.sum()).numpy()[:, None]
    np.testing.assert_allclose(heads.classifier.features(pairs.images).numpy(), own)
    found = own @ (heads.image.mT @ heads.text).numpy() @ y.T
    expected = own @ PLAIN[method](x, y, share, 0.3) @ y.T
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_neither_classes_of_no_weight_nor_thousands_have_posteriors():
    pairs, classes = pairs_of(8), class_pairs(3)
    rows, texts = (side.repeat(800, 1) for side in (classes.rows, classes.texts))
    many = ClassPairs(rows, texts, torch.arange(2400), classes.mean)
    without = classes._replace(posteriors=False)
    for given, weight in ((classes, 0.0), (many, 1.0), (without, 1.0)):
        assert regression_rows(pairs, given, weight).images.shape[1] == 12


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_split_product_is_the_singular_value_decomposition(shape):
    product = randn(*shape, seed=1)
    left, right = split_product(product)
    values = torch.linalg.svdvals(product)
    torch.testing.assert_close(left.mT @ right, product)
    torch.testing.assert_close(left @ left.mT, values.diag())
    torch.testing.assert_close(right @ right.mT, values.diag())


def test_an_image_counts_once_however_many_captions_it_has():
    images, texts = features(30)
    once = Pairs(images, texts, torch.arange(30))
    owners = torch.cat([torch.arange(30), torch.zeros(3, dtype=torch.int64)])
    thrice = Pairs(images, torch.cat([texts, texts[:1].expand(3, -1)]), owners)
    first, second = (fit_heads(pairs, None, 0.0, DEFAULT_FORM) for pairs in (once, thrice))
    torch.testing.assert_close(first.image.mT @ first.text, second.image.mT @ second.text)


def test_a_class_counts_once_however_many_texts_it_has():
    classes = class_pairs(5)
    owners = torch.tensor([0, 0, 0, 1, 2, 3, 4])
    several = classes._replace(texts=classes.texts[owners], owners=owners)
    rows = regression_rows(pairs_of(8), several, 0.5)
    assert torch.bincount(owners, rows.weights[8:]).tolist() == pytest.approx([0.5] * 5)


def test_directions_of_the_means_are_ignored():
    pairs = pairs_of(50)
    heads = fit_heads(pairs, None, 0.0, DEFAULT_FORM)
    for head, side in ((heads.image, pairs.images), (heads.text, pairs.texts)):
        assert float((head @ side.mean(dim=0)).norm() / head.norm()) < 1e-12


def test_a_ridge_refers_to_all_directions_of_features_with_fewer_columns():
    images, texts = features(6)
    # (12, 6), all directions that the images have
    basis = torch.linalg.qr(images.mT).Q
    products = []
    for x, widths in ((images, None), (images @ basis, (12, 7))):
        known = moments(x, texts, torch.arange(6), torch.ones(6).double())
        axes, maps = solve.solve(known, (DEFAULT_FORM,), widths)
        image, text = (own @ head.mT for own, head in zip(axes, maps[0], strict=True))
        products.append((x @ image) @ (texts @ text).mT)
    torch.testing.assert_close(*products)


# A mean that is rounded, and one that is exact
@pytest.mark.parametrize("features", [torch.ones, torch.eye])
def test_features_without_variance_give_finite_heads(features):
    pairs = Pairs(features(1, 12).expand(5, -1), features(1, 7).expand(5, -1), torch.arange(5))
    heads = fit_heads(pairs, None, 0.0, DEFAULT_FORM)
    assert heads.image.isfinite().all()
    assert heads.text.isfinite().all()


def test_a_common_vector_of_the_classifier_changes_nothing():
    classes, pairs = class_pairs(), pairs_of(25)
    moved = classes._replace(rows=classes.rows + torch.linspace(-3, 3, 12, dtype=torch.float64))
    products = []
    for each in (classes, moved):
        heads = fit_heads(pairs, each, 1.0, DEFAULT_FORM)
        products.append(heads.image.mT @ heads.text)
    torch.testing.assert_close(*products)


@pytest.mark.parametrize("form", [Form("ridge", 0.1), Form("cca", 3.0), Form("pulled", 10.0)])
def test_one_form_by_cholesky_factors_is_that_of_several_by_axes(form):
    sides = randn(2, 9, 6)
    known = moments(*sides, torch.arange(9), torch.linspace(0.1, 1, 9, dtype=torch.float64))
    (x_axes, y_axes), ((left, right),) = solve.solve(known, (form,))
    one = solve.solve_one(known, form)
    for axes, found, single in ((x_axes, left, one[0]), (y_axes, right, one[1])):
        turned = found @ axes.mT  # equal but for signs
        torch.testing.assert_close(turned.mT @ turned, single.mT @ single)
    torch.testing.assert_close(x_axes @ left.mT @ right @ y_axes.mT, one[0].mT @ one[1])
