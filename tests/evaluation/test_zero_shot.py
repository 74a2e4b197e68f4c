"""Zero-shot classification against an independent computation in NumPy."""

import numpy as np
import pytest
import torch
from numpy.random import default_rng

from declip.data.pair import SkipCounter
from declip.errors import UserError
from declip.evaluation.encode import SourceFeatures
from declip.evaluation.zero_shot import class_features, classify, predict, read_templates


def _features(images: torch.Tensor) -> SourceFeatures:
    n = len(images)
    return SourceFeatures("hand", np.arange(n), images, ((),) * n, None, np.arange(0), SkipCounter())


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_class_features_are_the_normalized_mean_of_normalized_ones(model) -> None:
    found = class_features(model, ["red", "blue"], ["{}", "{} and green", "white {} {}"])
    red, green, blue, white = np.eye(3)[0], np.eye(3)[1], np.eye(3)[2], np.ones(3)

    def mean(color: np.ndarray) -> np.ndarray:
        return _unit(np.mean([_unit(t + 1e-3) for t in (color, color + green, white + 2 * color)], axis=0))

    np.testing.assert_allclose(found.numpy(), [mean(red), mean(blue)], atol=1e-6)


def test_numbers_equal_an_independent_computation() -> None:
    rng = default_rng(5)
    labels = rng.integers(0, 12, size=300)
    labels[labels == 7] = 8  # a class without an image
    classes = _unit(rng.standard_normal((12, 16)))
    images = _unit(classes[labels] + 0.4 * rng.standard_normal((300, 16)))
    result = classify(_features(torch.from_numpy(images)), labels, torch.from_numpy(classes))
    order = np.argsort(-images @ classes.T, axis=1)
    hit = order[:, 0] == labels
    assert result.top1 == pytest.approx(hit.mean())
    assert 0.2 < result.top1 < 0.95
    assert result.top5 == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    assert result.mean_per_class == pytest.approx(np.mean([hit[labels == c].mean() for c in range(12) if c != 7]))
    assert (result.n, result.classes, result.chance) == (300, 12, 1 / 12)
    assert result.times_chance == pytest.approx(hit.mean() * 12)


def test_of_classes_of_the_same_name_the_first_is_right_as_argmax_has_it() -> None:
    generator = torch.Generator().manual_seed(3)
    classes = torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1)[[4, 0, 1, 0, 2, 0]]
    images = torch.nn.functional.normalize(torch.randn(200, 8, generator=generator), dim=1)
    labels = default_rng(0).integers(0, 6, size=200)
    hit = (images @ classes.T).argmax(1).numpy() == labels
    result = classify(_features(images), labels, classes)
    assert result.top1 == pytest.approx(hit.mean())
    assert 0 < hit[labels == 1].mean() < 1
    assert not hit[np.isin(labels, (3, 5))].any()


def test_a_model_that_gives_every_class_the_same_feature_names_only_the_first() -> None:
    result = classify(_features(torch.eye(3)), np.arange(3), torch.ones(3, 3) / 3**0.5)
    assert result.top1 == pytest.approx(1 / 3)


def test_a_label_without_a_name() -> None:
    with pytest.raises(UserError, match=r"label 3.*numbered 0 to 2"):
        classify(_features(torch.eye(3)), np.array([0, 1, 3]), torch.eye(3))


@pytest.mark.parametrize("block", [1, 1_000])
def test_predict_gives_the_nearest_classes_best_first(block: int) -> None:
    images = torch.tensor([[0.1, 0.9, 0.5], [0.8, 0.2, 0.3]])
    rows, cosines = predict(images, torch.eye(3), count=2, block=block)
    assert rows.tolist() == [[1, 2], [0, 2]]
    np.testing.assert_allclose(cosines, [[0.9, 0.5], [0.8, 0.3]], atol=1e-7)


def test_templates_given_by_hand() -> None:
    assert read_templates("food101")[1] == ["a photo of {}, a type of food."]
    assert read_templates("a {} here") == ("a {} here", ["a {} here"])
    assert read_templates(["{}", "a {}"]) == ("{} | a {}", ["{}", "a {}"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("emojy", "Did you mean 'emoji'"),
        (["{}", "a cat"], "'a cat' has none"),
        ([], "no template"),
    ],
)
def test_wrong_templates(given: str | list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_templates(given)


def test_braces_in_a_class_name_are_only_a_name(model) -> None:
    assert class_features(model, ["{0} red", "}{"], ["a {}"]).shape == (2, 3)


def test_nan_loses() -> None:
    result = classify(_features(torch.full((6, 6), float("nan"))), np.arange(6), torch.eye(6))
    assert (result.top1, result.top5, result.mean_per_class) == (0.0, 0.0, 0.0)
