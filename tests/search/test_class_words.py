"""Queries that are a word for several classes of the built-in built_in."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import normalize

import declip
from conftest import draw
from declip.models.posteriors import PosteriorProjection
from declip.search.class_words import class_direction, classes_of


def model_of(encoder, classes=1_000):
    recipe = SimpleNamespace(text=SimpleNamespace(hf_model=encoder))
    return SimpleNamespace(
        recipe=recipe, image_tower=SimpleNamespace(proj=PosteriorProjection(4, classes, 3))
    )


def test_a_word_has_its_classes_in_any_form_and_a_phrase_or_another_model_none():
    model = model_of("builtin:lite2-minilm")
    animals = classes_of("animal", model)
    assert len(animals) == 398
    assert animals == classes_of(" The Animals.", model)
    assert set(classes_of("birds", model)) < set(animals)
    assert [classes_of(text, model) for text in ("", "an animal on a table", "object", "arm")] == [
        ()
    ] * 4
    other = SimpleNamespace(recipe=None)
    assert classes_of("animal", model_of(None)) == classes_of("animal", other) == ()


def test_the_direction_is_the_mean_of_classes_as_images():
    model = model_of("builtin:lite2-minilm")
    projection = model.image_tower.proj
    projection.classes.copy_(torch.randn(1_000, 4))
    projection.direction.copy_(normalize(torch.randn(4), dim=0))
    # An image that is only its class: the classifier's row without the mean row, and a posterior of 1
    rows = projection.classes - projection.classes.mean(dim=0)
    rows = normalize(rows - (rows @ projection.direction)[:, None] * projection.direction, dim=1)
    images = [torch.cat([rows[c], torch.eye(1_000)[c]]) @ projection.weight.mT for c in (3, 7)]
    expected = normalize(sum(normalize(image, dim=0) for image in images), dim=0)
    torch.testing.assert_close(class_direction(model, (3, 7)), expected.detach())
    assert class_direction(model_of("builtin:lite2-minilm", classes=10), (3, 7)) is None


def test_a_class_named_by_such_a_word_is_compared_as_images_too(built_in):
    names, image = ["animals", "a red square"], draw("red", "bar")
    [found] = declip.classify(built_in, [image], names, templates="{}").predictions
    texts = built_in.encode_text(names)
    animals = class_direction(built_in, classes_of("animals", built_in))
    texts[0] = normalize(texts[0] + animals, dim=0)
    scores = built_in.logit_scale.exp() * built_in.encode_image([image]) @ texts.T
    assert list(found.probabilities.values()) == pytest.approx(
        scores.softmax(dim=1)[0].tolist(), abs=1e-5
    )


def test_a_search_for_a_class_word_reads_the_image_tower_and_no_other_does(explained):
    index = declip.Index.open(explained.folder)
    phrase = index.query("animals in the snow")
    assert "model" not in vars(index)
    word, text = index.query("animals"), index.text_model.encode_text(["animals"])[0]
    images = class_direction(index.model, classes_of("animals", index.model))
    torch.testing.assert_close(word, normalize(text + images, dim=0))
    torch.testing.assert_close(phrase, index.text_model.encode_text(["animals in the snow"])[0])
