"""Which queries are shown and marked right, which classes are confused, the queue's neighbors, and training views."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from declip.data.batch import PairBatch
from declip.data.pair import SkipCounter
from declip.data.text.tokenizer import Tokenizer
from declip.evaluation.encode import SourceFeatures
from declip.reports.examples import confusions, neighbors, retrieval, shown_pairs
from declip.reports.thumbnails import thumbnails_of
from declip.supervision.nearest_neighbor import Queue
from reports.conftest import plan

COLOURS = ["red", "green", "blue", "cyan", "yellow", "white"]
RNG = np.random.default_rng


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
    queries, right_fraction = retrieval(features, thumbnails, RNG(0), each=2)
    assert [query.rank for query in queries] == [1, 1, 2, 2]
    assert right_fraction == 0.5
    for query in queries:
        own = COLOURS.index(query.words.split()[0])
        assert [hit.right for hit in query.hits] == [hit.words == query.words for hit in query.hits]
        assert query.hits[query.rank - 1].image == thumbnails(own)
        assert query.hits[query.rank - 1].cosine == pytest.approx(1.0 if own < 3 else 0.5)
    first = queries[2].hits[0]
    assert (first.right, first.cosine) == (False, pytest.approx(1.0))


def test_an_image_with_the_same_caption_is_right(painted) -> None:
    captions = [("a cat",), ("a cat",), ("a dog",)]
    features = _features(np.eye(3), np.eye(3)[[0, 0, 2]], captions)
    queries, _ = retrieval(features, thumbnails_of(painted(COLOURS[:3], captions)), RNG(0))
    cat = next(query for query in queries if query.words == "a cat")
    assert cat.rank == 1
    assert {hit.words for hit in cat.hits if hit.right} == {"a cat"}
    assert sum(hit.right for hit in cat.hits) == 2


def test_confusions_by_count_then_by_how_sure(painted) -> None:
    labels = np.array([0, 0, 0, 1, 2, 2])
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
    rows, wrong = confusions(features, labels, names, torch.eye(4), thumbnails_of(painted(COLOURS)))
    assert [(row.words, row.other_words, row.times, row.size) for row in rows] == [
        ("zero", "one", 2, 3),
        ("two", "one", 1, 2),
        ("one", "zero", 1, 1),
    ]
    assert rows[0].image.alt == "green"  # the first image that was taken for it
    assert rows[0].other_image.alt == "cyan"  # the first image of class one
    assert wrong == 4


class _Words:
    """Words that a pair of four showed in an epoch."""

    def words(self, tag: int, view: int) -> str:
        return f"{COLOURS[tag % 4]} of epoch {tag // 4}" + (" reworded" if view else "")


def _queue(*entries: tuple[list[float], int, int, int], size: int = 8) -> Queue:
    """Entries of a feature, epoch, index and view."""
    queue = Queue(size, 3)
    for feature, epoch, index, view in entries:
        queue.push(torch.tensor([feature]), torch.tensor([2 * (4 * epoch + index) + view]))
    return queue


def test_neighbors_of_other_pairs_with_their_words_each_pair_once(model, painted) -> None:
    queue = _queue(
        ([0.9, 0.0, 0.1], 0, 1, 0),  # green, overwritten as the queue wraps
        ([1.0, 0.0, 0.0], 3, 0, 0),  # red itself, from epoch 3
        ([0.9, 0.1, 0.0], 2, 3, 1),  # the fourth, reworded in epoch 2
        ([0.8, 0.2, 0.0], 1, 3, 0),  # the fourth again, further
        ([0.0, 0.0, 1.0], 1, 2, 0),  # blue
        size=4,
    )
    source = painted(["red", "green", "blue", "yellow"])
    found = {row.words: row.hits for row in neighbors(model, queue, source, _Words(), RNG(0))}
    assert found.keys() == {"red", "green", "blue", "yellow"}
    assert [hit.words for hit in found["red"]] == ["cyan of epoch 2 reworded", "blue of epoch 1"]
    assert found["red"][0].cosine == pytest.approx(0.9 / 0.82**0.5, abs=2e-3)
    assert [hit.image.alt for hit in found["red"]] == ["yellow", "blue"]
    unnamed = Queue(4, 3)
    unnamed.push(torch.eye(3))
    assert neighbors(model, unnamed, source, _Words(), RNG(0)) == []
    assert neighbors(model, None, source, _Words(), RNG(0)) == []


def test_views_are_unnormalized_and_texts_decoded(painted) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    tokenizer = Tokenizer(context=16, merges=4000)
    ids, changed = (tokenizer.encode(text) for text in ("a red cat sat", "a cat red sat"))
    masked, labels = list(ids), [-100] * len(ids)
    cat, sat = (tokenizer.encode(word)[1] for word in ("cat", "sat"))
    masked[ids.index(cat)], labels[ids.index(cat)] = tokenizer.mask, cat
    masked[ids.index(sat)], labels[ids.index(sat)] = cat, sat
    batch = PairBatch(
        views={"first": torch.zeros(1, 3, 8, 8), "second": torch.ones(1, 3, 8, 8)},
        texts=torch.tensor([[ids], [changed]]),
        masked=torch.tensor([masked]),
        labels=torch.tensor([labels]),
        sample_ids=torch.tensor([4 + 1]),
    )
    (pair,) = shown_pairs(batch, painted(COLOURS[:4]), plan(mean, std), tokenizer, RNG(0))
    assert pair.original is not None
    assert pair.original.alt == "green"
    assert _pixel(pair.views[0].src) == pytest.approx(tuple(round(255 * m) for m in mean), abs=1)
    second = tuple(min(255, round(255 * (m + s))) for m, s in zip(mean, std, strict=True))
    assert _pixel(pair.views[1].src) == pytest.approx(second, abs=1)
    assert {name: text.replace(" ", "") for name, text in pair.texts.items()} == {
        "caption": "aredcatsat",
        "augmented": "acatredsat",
        "masked": "ared[mask:cat][cat:sat]",
    }


def _pixel(src: str) -> tuple[int, ...]:
    return Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).getpixel((3, 3))
