"""Examples of the report: the queries shown."""

import numpy as np
import pytest
import torch

from declip.data.images.thumbnails import thumbnails_of
from declip.reports.run import retrieval
from evaluation.conftest import features_of

COLOURS = ["red", "green", "blue", "cyan", "yellow", "white"]
RNG = np.random.default_rng


def _features(images, texts, captions):
    return features_of(torch.tensor(images).float(), captions, torch.tensor(texts).float())


@pytest.fixture
def half_right(painted):
    """Six pairs; the captions of the last three point at their left neighbors."""
    images, texts = np.eye(6), np.eye(6)
    texts[3:] = np.eye(6)[2:5] + 0.5 * np.eye(6)[3:]
    captions = [(f"{color} thing",) for color in COLOURS]
    return _features(images, texts, captions), thumbnails_of(painted(COLOURS, captions))


def test_captions_found_and_not_found(half_right):
    features, thumbnails = half_right
    queries, right_fraction = retrieval(features, thumbnails, RNG(0), each=2)
    assert [query.rank for query in queries] == [1, 1, 2, 2]
    assert right_fraction == 0.5
    for query in queries:
        own = COLOURS.index(query.caption.split()[0])
        assert [hit.correct for hit in query.hits] == [hit.caption == query.caption for hit in query.hits]
        assert query.hits[query.rank - 1].image == thumbnails(own)
    assert not queries[2].hits[0].correct


def test_an_image_with_the_same_caption_is_right(painted):
    captions = [("a cat",), ("a cat",), ("a dog",)]
    features = _features(np.eye(3), np.eye(3)[[0, 0, 2]], captions)
    queries, _ = retrieval(features, thumbnails_of(painted(COLOURS[:3], captions)), RNG(0))
    cat = next(query for query in queries if query.caption == "a cat")
    assert cat.rank == 1
    assert {hit.caption for hit in cat.hits if hit.correct} == {"a cat"}
    assert sum(hit.correct for hit in cat.hits) == 2
