"""Heads in closed form against plain loops and scikit-learn, and their choice by cross-validation."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from declip.training.heads import (
    ClassPairs,
    Pairs,
    assign_folds,
    choose_heads,
    fit_heads,
    held_out,
    split_product,
    two_way_ridge,
)


def features(n: int, v: int = 12, w: int = 7, seed: int = 0, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (n, v) and texts (n, w) that share four directions, with means that are not 0."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.Generator().manual_seed(99)
    shared = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    sides = []
    for width in (v, w):
        mixing = torch.randn(4, width, generator=maps, dtype=torch.float64)
        blur = noise * torch.randn(n, width, generator=generator, dtype=torch.float64)
        sides.append(shared @ mixing + blur + torch.randn(width, generator=maps, dtype=torch.float64))
    return sides[0], sides[1]


def pairs_of(n: int, **options: float) -> Pairs:
    images, texts = features(n, **options)
    return Pairs(images, texts, torch.arange(n))


def centered(side: torch.Tensor, weights: torch.Tensor) -> np.ndarray:
    rows, mean = side.numpy(), np.average(side.numpy(), axis=0, weights=weights.numpy())
    direction = mean / np.linalg.norm(mean)
    rows = rows - np.outer(rows @ direction, direction)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("ridge", [0.1, 3.0])
def test_two_way_ridge_is_scikit_learns_ridge_both_ways(ridge: float) -> None:
    images, texts = features(40)
    weights = torch.linspace(0.5, 2.0, 40, dtype=torch.float64)
    (heads,) = two_way_ridge(images, texts, weights, (ridge,))

    x, y, share = centered(images, weights), centered(texts, weights), (weights / weights.sum()).numpy()
    product = np.zeros((12, 7))
    for source, target, transposed in ((x, y, False), (y, x, True)):
        # scikit-learn sums over rows: ε times the mean eigenvalue of the weighted covariance, trace / width.
        alpha = ridge * np.trace((source * share[:, None]).T @ source) / source.shape[1]
        coefficients = Ridge(alpha=alpha, fit_intercept=False).fit(source, target, sample_weight=share).coef_
        coefficients = coefficients if transposed else coefficients.T
        product += coefficients / np.linalg.norm(coefficients)

    bilinear = (heads.image.mT @ heads.text).numpy()
    np.testing.assert_allclose(x @ bilinear @ y.T, x @ product @ y.T, atol=1e-8)


@pytest.mark.parametrize("shape", [(9, 5), (5, 9), (6, 6)])
def test_split_product_is_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    product = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left, right = split_product(product)
    values = torch.linalg.svdvals(product)
    torch.testing.assert_close(left.mT @ right, product)
    torch.testing.assert_close(left @ left.mT, values.diag())
    torch.testing.assert_close(right @ right.mT, values.diag())


def test_an_image_counts_once_however_many_captions_it_has() -> None:
    images, texts = features(30)
    once = Pairs(images, texts, torch.arange(30))
    owners = torch.cat([torch.arange(30), torch.zeros(3, dtype=torch.int64)])
    thrice = Pairs(images, torch.cat([texts, texts[:1].expand(3, -1)]), owners)
    everything = torch.ones(30, dtype=torch.bool)
    (first,), (second,) = (fit_heads(pairs, everything, None, 0.0, (1.0,)) for pairs in (once, thrice))
    torch.testing.assert_close(first.image.mT @ first.text, second.image.mT @ second.text)


def test_directions_of_the_means_are_ignored() -> None:
    pairs = pairs_of(50)
    (heads,) = fit_heads(pairs, torch.ones(50, dtype=torch.bool), None, 0.0, (1.0,))
    for head, side in ((heads.image, pairs.images), (heads.text, pairs.texts)):
        assert float((head @ side.mean(dim=0)).norm() / head.norm()) < 1e-12


def test_features_without_variance_give_finite_heads() -> None:
    pairs = Pairs(torch.ones(5, 12), torch.ones(5, 7), torch.arange(5))
    (heads,) = fit_heads(pairs, torch.ones(5, dtype=torch.bool), None, 0.0, (1.0,))
    assert bool(heads.image.isfinite().all() and heads.text.isfinite().all())


def class_pairs(count: int = 60) -> ClassPairs:
    """Classes whose rows and names share the directions that the pairs share."""
    rows, texts = features(count, seed=7)
    return ClassPairs(rows, texts, torch.arange(count), rows.mean(dim=0))


def test_classes_alone_make_heads_that_find_images() -> None:
    nothing = Pairs(torch.empty(0, 12), torch.empty(0, 7), torch.empty(0, dtype=torch.int64))
    choice = choose_heads(nothing, np.empty(0, np.int64), class_pairs())
    _, _, to_text, _ = held_out(choice.heads, pairs_of(40), torch.ones(40, dtype=torch.bool))
    assert choice.class_weight == 1
    assert float((to_text < 1).double().mean()) > 0.5  # chance: 1 of 40


def test_a_common_vector_of_the_classifier_changes_nothing() -> None:
    classes, pairs, chosen = class_pairs(), pairs_of(25), torch.ones(25, dtype=torch.bool)
    moved = classes._replace(rows=classes.rows + torch.linspace(-3, 3, 12, dtype=torch.float64))
    products = []
    for each in (classes, moved):
        (heads,) = fit_heads(pairs, chosen, each, 1.0, (1.0,))
        products.append(heads.image.mT @ heads.text)
    torch.testing.assert_close(*products)


def test_choice_leaves_wrong_classes_out() -> None:
    classes, pairs = class_pairs(300), pairs_of(60)
    wrong = classes._replace(texts=classes.texts.flip(0))
    assert choose_heads(pairs, np.arange(60), wrong).class_weight == 0
    assert choose_heads(pairs_of(20), np.arange(20), classes).class_weight > 0


def test_more_noise_needs_more_ridge() -> None:
    clear, noisy = (choose_heads(pairs_of(60, noise=noise), np.arange(60)).ridge for noise in (0.01, 3.0))
    assert clear < noisy


def test_cross_validated_recall_is_near_that_of_new_images() -> None:
    choice = choose_heads(pairs_of(400, noise=1.0), np.arange(400))
    _, _, to_text, to_image = held_out(choice.heads, pairs_of(80, noise=1.0, seed=5), torch.ones(80, dtype=torch.bool))
    truth = float((torch.cat([to_text, to_image]) < 10).double().mean())
    estimate = sum(count * recall for count, _, recall in choice.recalls) / 400
    assert estimate == pytest.approx(truth, abs=0.1)  # folds of 80 images, too


def test_captions_that_do_not_fit_have_bad_ranks_out_of_fold() -> None:
    pairs = pairs_of(200)
    wrong = torch.arange(0, 40, 2)
    pairs.texts[wrong] = pairs.texts[wrong.roll(1)]
    fit = choose_heads(pairs, np.arange(200)).fit
    assert fit is not None
    assert int(torch.isin(fit.argsort(descending=True)[:30], wrong).sum()) >= 16


def test_folds_keep_groups_together_and_are_of_one_size() -> None:
    groups = np.repeat(np.arange(30), np.arange(30) % 4 + 1)
    folds = assign_folds(groups, 5)
    assert all(len(np.unique(folds[groups == group])) == 1 for group in range(30))
    assert np.ptp(np.bincount(folds)) <= 1


def test_fewer_groups_than_can_be_validated_take_the_defaults() -> None:
    choice = choose_heads(pairs_of(30), np.arange(30) // 2)
    assert (choice.ridge, choice.class_weight, choice.recalls, choice.fit) == (1.0, 0.0, (), None)
