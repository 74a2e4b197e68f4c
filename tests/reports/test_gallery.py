"""Which queries are shown, what is marked right, and which classes are confused."""

import numpy as np
import pytest
import torch

from declip.data.pair import SkipCounter
from declip.evaluation.encode import SourceFeatures
from declip.reports.gallery import confusions, image_to_text, text_to_image
from declip.reports.thumbnails import thumbnails_of

COLOURS = ["red", "green", "blue", "cyan", "yellow", "white"]


def _features(images, texts, captions) -> SourceFeatures:
    indices = np.arange(len(captions))
    tensors = (torch.tensor(rows, dtype=torch.float32) for rows in (images, texts))
    return SourceFeatures("hand", indices, next(tensors), tuple(captions), next(tensors), SkipCounter())


@pytest.fixture
def half_right(painted):
    """Six pairs; the captions of the last three point at their left neighbors."""
    images, texts = np.eye(6), np.eye(6)
    texts[3:] = np.eye(6)[2:5] + 0.5 * np.eye(6)[3:]
    captions = [(f"{color} thing",) for color in COLOURS]
    return _features(images, texts, captions), thumbnails_of(painted(COLOURS, captions))


def test_captions_found_and_not_found(half_right) -> None:
    features, thumbnails = half_right
    gallery = text_to_image(features, thumbnails, np.random.default_rng(0), each=2, shown=3)
    assert [query.rank for query in gallery.queries] == [1, 1, 2, 2]
    assert (gallery.candidates, gallery.right_fraction) == (6, 0.5)
    for query in gallery.queries:
        own = COLOURS.index(query.words.split()[0])
        assert [hit.right for hit in query.hits] == [hit.words == query.words for hit in query.hits]
        assert query.own.image == thumbnails(own)
        assert query.own.cosine == pytest.approx(1.0 if own < 3 else 0.5)
    first = gallery.queries[2].hits[0]
    assert (first.right, first.cosine) == (False, pytest.approx(1.0))


def test_an_image_with_the_same_caption_is_right(painted) -> None:
    captions = [("a cat",), ("a cat",), ("a dog",)]
    features = _features(np.eye(3), np.eye(3)[[0, 0, 2]], captions)
    gallery = text_to_image(features, thumbnails_of(painted(COLOURS[:3], captions)), np.random.default_rng(0))
    cat = next(query for query in gallery.queries if query.words == "a cat")
    assert cat.rank == 1
    assert {hit.words for hit in cat.hits if hit.right} == {"a cat"}
    assert sum(hit.right for hit in cat.hits) == 2


def test_images_and_their_captions_each_string_once(painted) -> None:
    captions = [("a cat", "a pet"), ("a dog", "a pet")]
    texts = [[1.0, 0.2], [0.5, 0.6], [0.9, 0.1], [0.5, 0.6]]
    features = _features(np.eye(2), texts, captions)
    gallery = image_to_text(features, thumbnails_of(painted(COLOURS[:2], captions)), np.random.default_rng(0))
    assert gallery.candidates == 3
    cat, dog = sorted(gallery.queries, key=lambda query: query.words)
    assert [(hit.words, hit.right) for hit in cat.hits] == [("a cat", True), ("a dog", False), ("a pet", True)]
    assert cat.rank == 1
    assert [(hit.words, hit.right) for hit in dog.hits] == [("a pet", True), ("a cat", False), ("a dog", True)]
    assert dog.own.words == "a pet"


def test_confusions_by_count_then_by_how_sure(painted) -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
    classes = torch.eye(4)
    images = [
        [0.9, 0.1, 0, 0],  # right
        [0.1, 0.9, 0, 0],  # 0 taken for 1
        [0.2, 0.9, 0, 0],  # 0 taken for 1
        [0.5, 0.4, 0, 0],  # 1 taken for 0, by 0.1
        [0, 0.9, 0.1, 0],  # 2 taken for 1, by 0.8
        [0, 0, 0.9, 0],  # right
    ]
    features = _features(images, images, [(color,) for color in COLOURS])
    names = ("zero", "one", "two", "three")
    found = confusions(features, labels, names, classes, thumbnails_of(painted(COLOURS)))
    assert [(row["true"], row["taken_for"], row["count"], row["of"]) for row in found.rows] == [
        ("zero", "one", 2, 3),
        ("two", "one", 1, 2),
        ("one", "zero", 1, 1),
    ]
    assert found.rows[1]["margin"] == pytest.approx(0.8)
    assert found.rows[0]["true_image"].alt == "green"  # the first image that was taken for it
    assert found.rows[0]["taken_for_image"].alt == "cyan"  # the first image of class one
    assert (found.wrong, found.n, found.single) == (4, 6, False)
