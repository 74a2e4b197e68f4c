"""Zero-shot classification against an independent computation in NumPy, and the shipped prompts and class names."""

import hashlib
from importlib import resources

import numpy as np
import pytest
import torch
from numpy.random import default_rng
from timm.data import ImageNetInfo
from torch.nn.functional import normalize

from conftest import refuses
from declip.evaluation.datasets import NAMED
from declip.evaluation.prompt_sets import (
    class_names,
    prompt_names,
    read_prompts,
    read_templates,
)
from declip.evaluation.readers import wnids_of
from declip.evaluation.zero_shot import (
    class_features,
    classify,
)
from declip.models.encoder import as_encoder
from evaluation.conftest import features_of


def _unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_class_features_are_the_normalized_mean_of_normalized_ones(model):
    templates = ["{}", "{} and green", "white {} {}"]
    found = class_features(as_encoder(model), ["red", "blue"], templates)
    red, green, blue = np.eye(3)

    def mean(color):
        texts = np.stack([color, color + green, 1 + 2 * color])
        return _unit(_unit(texts + 1e-3).mean(axis=0))

    np.testing.assert_allclose(found.numpy(), [mean(red), mean(blue)], atol=1e-6)
    # Braces in a class name are only a name.
    assert class_features(as_encoder(model), ["{0} red", "}{"], ["a {}"]).shape == (2, 3)


def test_numbers_equal_an_independent_computation():
    rng = default_rng(5)
    labels = rng.integers(0, 12, size=300)
    labels[labels == 7] = 8  # a class without an image
    classes = _unit(rng.standard_normal((12, 16)))
    images = _unit(classes[labels] + 0.4 * rng.standard_normal((300, 16)))
    result = classify(features_of(torch.from_numpy(images)), labels, torch.from_numpy(classes))
    order = np.argsort(-images @ classes.T, axis=1)
    hit = order[:, 0] == labels
    assert result.top1 == pytest.approx(hit.mean())
    assert 0.2 < result.top1 < 0.95
    assert result.top5 == pytest.approx((order[:, :5] == labels[:, None]).any(1).mean())
    assert result.mean_per_class == pytest.approx(
        np.mean([hit[labels == c].mean() for c in range(12) if c != 7])
    )
    assert (result.n, result.classes, result.chance) == (300, 12, 1 / 12)
    assert result.majority == np.bincount(labels).max() / 300


def test_of_classes_of_the_same_name_the_first_is_right_as_argmax_has_it():
    generator = torch.Generator().manual_seed(3)
    classes = normalize(torch.randn(6, 8, generator=generator), dim=1)[[4, 0, 1, 0, 2, 0]]
    images = normalize(torch.randn(200, 8, generator=generator), dim=1)
    labels = default_rng(0).integers(0, 6, size=200)
    hit = (images @ classes.T).argmax(1).numpy() == labels
    result = classify(features_of(images), labels, classes)
    assert result.top1 == pytest.approx(hit.mean())
    assert 0 < hit[labels == 1].mean() < 1
    assert not hit[np.isin(labels, (3, 5))].any()


def test_templates_by_name_and_by_hand():
    assert read_templates("food101")[1] == ["a photo of {}, a type of food."]
    assert read_templates("a {} here") == ("a {} here", ["a {} here"])
    assert read_templates(["{}", "a {}"]) == ("{} | a {}", ["{}", "a {}"])
    for given, message in (("emojy", "'emoji'"), (["{}", "a cat"], "'a cat'"), ([], r"\[\]")):
        refuses(message, read_templates, given)


DIGESTS = {
    "aircraft": "91522de75ad4", "caltech101": "610806b98066", "cars": "255ecc632c41", "cifar10": "9bbf912e1144",
    "cifar100": "9bbf912e1144", "dtd": "1f6888d2130f", "flowers102": "b7ec600cc4c7", "food101": "77a79bac7d9c",
    "imagenet": "0cb6809663fc", "pets": "16a0790f0e45", "sun397": "c97a3d1ad581",
}  # fmt: skip


def test_published_templates_and_names_are_unchanged():
    for name, digest in DIGESTS.items():
        found = read_prompts(name)
        text = "\n".join([*found.templates, *found.classes.values()])
        assert hashlib.sha256(text.encode()).hexdigest()[:12] == digest, name
    assert {named.templates for named in NAMED.values()} <= set(prompt_names())
    names = sorted(ImageNetInfo("imagenet1k").label_names())
    assert list(read_prompts("imagenet").classes) == names
    for name in ("imagenet_a", "imagenet_r"):
        path = resources.files("timm.data") / "_info" / f"{name}_synsets.txt"
        assert wnids_of(name.replace("_", "-")) == sorted(path.read_text().split())


def test_classes_of_another_set():
    strange = ["ant", "unicorn", "dragon"]
    refuses("2 classes.*'unicorn'.*102 classes of 'caltech101'", class_names, "caltech101", strange)
    refuses("Did you mean 'caltech101'", class_names, "caltech", ["ant"])
