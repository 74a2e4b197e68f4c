"""Few-shot classification: the closed form, names against images, what is left out, and the protocol."""

from statistics import mean, stdev

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize, one_hot

from conftest import refuses
from declip.evaluation.datasets import Dataset
from declip.evaluation.encode import encode_images
from declip.evaluation.few_shot import (
    NAME_WEIGHTS,
    RIDGES,
    Examples,
    FewShotForm,
    center_of,
    centered,
    class_folds,
    cross_validate,
    fit_few_shot,
    fit_mixture,
    halves,
    mixture_factors,
)
from declip.evaluation.protocols import Options, evaluate_all
from declip.evaluation.results import read_result, sample_per_class
from declip.evaluation.zero_shot import class_features
from declip.models.encoder import as_encoder

WIDTH = 17
"""Of features before the projection; embeddings have 12."""


def made_up(shots, classes=6, noise=0.5, names=0.0, seed=0):
    """Classes around random directions; `names` is the noise of their names, in units of the classes' distance."""
    rng = torch.Generator().manual_seed(seed)
    fixed = torch.Generator().manual_seed(99)
    centers = torch.randn(classes, 12, generator=fixed)
    labels = torch.arange(classes).repeat_interleave(shots)
    images = normalize(
        centers[labels] + noise * 3.5 * torch.randn(len(labels), 12, generator=rng) + 1, dim=1
    )
    texts = normalize(centers + names * 3.5 * torch.randn(classes, 12, generator=rng) - 2, dim=1)
    turned, _ = torch.linalg.qr(torch.randn(WIDTH, 12, generator=fixed))
    return Examples(torch.cat([images @ turned.mT, images], dim=1), labels, texts, WIDTH)


def accuracy(head, test):
    return float((head.scores(test.images).argmax(1) == test.labels).float().mean())


@pytest.mark.parametrize(("shots", "classes"), [(2, 6), (40, 6), (3, 5)])
def test_the_weight_minimizes_the_weighted_squared_error(shots, classes):
    """The name of a class without images weighs as images and name."""
    examples, form = made_up(shots), FewShotForm(4.0, 0.1)
    examples = examples.take(examples.labels < classes)
    head = fit_mixture(examples, {form: 2.0})
    x = centered(examples.images, center_of(examples), WIDTH) / 2**0.5
    names = normalize(examples.names - examples.names.mean(0), dim=1)
    x = torch.cat([x, torch.cat([torch.zeros(6, WIDTH), names / 2**0.5], dim=1)])
    y = torch.cat([one_hot(examples.labels, 6), torch.eye(6)]) - 1 / 6
    w = torch.cat([torch.full((classes * shots,), 1 / shots), torch.full((6,), 4 / shots)])
    w[len(x) - 6 + classes :] = 1 + 4
    expected = torch.linalg.solve(x.T * w @ x + 0.1 * torch.eye(WIDTH + 12), x.T * w @ y).T
    z = centered(made_up(3, seed=1).images, head.center, WIDTH) / 2**0.5
    assert torch.allclose(head.scores(made_up(3, seed=1).images), 2 * z @ expected.T, atol=1e-4)


def test_square_roots_of_features_without_negative_values():
    images = torch.tensor([[1.0, 4.0, 3.0, 4.0], [1.0, -4.0, 3.0, 4.0]])
    expected = torch.tensor(
        [[1 / 5**0.5, 2 / 5**0.5, 0.6, 0.8], [1 / 17**0.5, -4 / 17**0.5, 0.6, 0.8]]
    )
    assert torch.allclose(halves(images, 2), expected)


def test_good_names_weigh_more_than_images_and_bad_ones_nothing():
    test = made_up(100, noise=0.8, seed=1)
    few = {noise: made_up(4, noise=0.8, names=noise) for noise in (0.0, 5.0)}
    good, bad = (fit_few_shot(few[noise]) for noise in (0.0, 5.0))
    alone = fit_few_shot(few[0.0].take([]))
    assert good.name_weight >= 4 > bad.name_weight
    assert accuracy(good, test) > accuracy(bad, test)
    assert (accuracy(alone, test) > 0.4, alone.accuracy) == (True, None)


def test_the_accuracy_is_that_of_images_that_were_not_seen():
    right = 0
    for seed in range(6):
        head = fit_few_shot(made_up(8, noise=0.8, names=1.0, seed=seed))
        low, high = head.accuracy.interval
        right += low <= accuracy(head, made_up(200, noise=0.8, seed=50)) <= high
        assert head.accuracy.n == 48
    assert right >= 5


def test_the_accuracy_of_a_fold_is_by_settings_from_the_other_folds():
    forms = [FewShotForm(weight, ridge) for weight in NAME_WEIGHTS for ridge in RIDGES]
    different = 0
    for seed in range(4):
        examples = made_up(4, noise=1.5, names=1.0, seed=seed)
        folds, right = class_folds(examples.labels, np.arange(24)), 0
        scores, head = cross_validate(examples, forms, folds), fit_few_shot(examples)
        for fold in range(4):
            held_out = folds == fold
            factors = mixture_factors(scores[:, ~held_out], examples.labels[~held_out])
            mixture = dict(zip(forms, factors.tolist(), strict=True))
            other = fit_mixture(examples.take(~held_out), mixture)
            right += round(6 * accuracy(other, examples.take(held_out)))
        assert (head.accuracy.value, head.shots) == (right / 24, 3)
        factors = torch.tensor(list(head.mixture.values()))
        predicted = (factors @ scores.flatten(1)).view(24, 6).argmax(1)
        different += int((predicted == examples.labels).sum()) - right
    assert different > 0, "settings from all folds have seen the images: too high"


def test_images_of_one_group_are_left_out_together():
    objects = np.arange(10).repeat(6)
    # Six views of each object, whose classes are drawn at random
    examples = made_up(6, classes=10, noise=0.03)
    examples = Examples(examples.images, torch.from_numpy(objects % 3), torch.eye(3, 12), WIDTH)
    alone, together = fit_few_shot(examples), fit_few_shot(examples, groups=objects)
    assert (alone.accuracy.value > 0.9, together.accuracy.value < 0.6) == (True, True)
    assert (alone.accuracy.n, together.accuracy.n) == (60, 10), (
        "images of one object are not independent"
    )
    folds = class_folds(examples.labels, objects)
    assert all(len(folds[objects == number].unique()) == 1 for number in range(10))
    assert fit_few_shot(examples, groups=np.zeros(60)).accuracy is None, "nothing can be left out"


def test_classes_of_one_object_are_not_part_of_the_accuracy():
    # Class 0 has 32 views of one object, class 1 8: nothing can be left out, whatever the classes are called.
    labels = torch.arange(2).repeat_interleave(torch.tensor([32, 8]))
    images = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    two = Examples(images, labels, torch.eye(2, 12), 12)
    head = fit_few_shot(two, groups=labels.numpy())
    assert (head.accuracy, head.unmeasured, bool(head.weight.isfinite().all())) == (None, 2, True)
    # One class of six has one object, which does not change the accuracy of the others.
    examples = made_up(6, noise=0.3, names=1.0)
    groups = np.where(examples.labels == 5, 99, np.arange(36))
    head = fit_few_shot(examples, groups=groups)
    assert (head.accuracy.n, head.unmeasured) == (30, 1)
    assert head.accuracy.value > 0.8
    # The accuracy of a single class would say nothing: all images may get its name.
    groups = np.where(examples.labels > 0, 99 + examples.labels, np.arange(36))
    one = fit_few_shot(examples, groups=groups)
    assert (one.accuracy, one.unmeasured) == (None, 5)


def test_the_protocol_gives_names_and_images(model, painted):
    colors = ["red", "green", "blue"]
    train = painted(colors * 4, classes=colors, broken=[0])
    dataset = Dataset(
        "colors",
        {"train": lambda: train, "test": lambda: painted(colors * 2, classes=colors, broken=[5])},
    )
    (result,) = evaluate_all(model, dataset, ("few-shot",), Options(shots=(2,), progress=False))
    assert (result.top1, result.names_top1, result.n, result.shots) == (1.0, 1.0, 5, 2)
    assert result.skipped == {"truncated image": 2}, "of both splits"
    assert result.measures()[0].name == "2 shots, top-1"
    assert read_result(result.to_dict()) == result
    refuses("shots", Options, shots=(0,))
    refuses("batch_size", Options, batch_size=0)
    bare = Dataset("x", {"test": lambda: train})
    refuses(r"train split.*few-shot", evaluate_all, model, bare, ("few-shot",))


def test_the_protocol_equals_a_loop_over_draws(model, painted):
    colors, names = ["red", "green", "blue"], ["green", "blue", "red"]  # names mislead
    train, test = (painted(colors * count, classes=colors) for count in (8, 2))
    train.class_names = test.class_names = names
    train.colors[::6] = ["blue"] * 4  # half of the images of the first class
    dataset = Dataset("colors", {"train": lambda: train, "test": lambda: test})
    (result,) = evaluate_all(model, dataset, ("few-shot",), Options(shots=(2,), progress=False))
    encoder = as_encoder(model)
    seen, tested = (encode_images(encoder, each).images for each in (train, test))
    train_labels, test_labels = train.columns["label"], test.columns["label"]
    labels, truth = torch.from_numpy(train_labels), torch.from_numpy(test_labels)
    top1 = []
    for seed in range(5):
        chosen = torch.from_numpy(sample_per_class(train_labels, lambda count: 2, seed))
        texts = class_features(encoder, names, ["{}"])
        head = fit_few_shot(Examples(seen[chosen], labels[chosen], texts, 0))
        top1.append(accuracy(head, Examples(tested, truth, texts, 0)))
    assert (result.names_top1, result.top1) == (0, pytest.approx(mean(top1)))
    assert result.deviation == pytest.approx(stdev(top1)) != 0


def test_a_class_without_images_is_found_by_its_name():
    examples, test = made_up(6, noise=0.2), made_up(40, noise=0.2, seed=3)
    head = fit_few_shot(examples.take(examples.labels != 2))
    assert all(form.name_weight > 0 for form in head.mixture)
    # Folds of 10 and four of 5 images
    assert head.shots == pytest.approx((10 * 20 + 4 * 5 * 25) / 30 / 5)
    assert accuracy(head, test.take(test.labels == 2)) > 0.5


def test_many_images_are_weighed_on_some_of_them():
    head = fit_few_shot(made_up(300))
    assert (head.accuracy.n, head.shots) == (1500, 200)


def test_the_center_is_the_mean_of_class_means():
    # One image of the first class, four of the others
    examples = made_up(4).take(torch.arange(24) > 2)
    means = [
        halves(examples.images[examples.labels == label], WIDTH).mean(dim=0) for label in range(6)
    ]
    assert torch.allclose(center_of(examples), torch.stack(means).mean(dim=0), atol=1e-6)
