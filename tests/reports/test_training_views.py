"""The queue's neighbors and the views, from a real queue, tokenizer and loader."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from declip.data.batch import PairBatch
from declip.data.text.tokenizer import Tokenizer
from declip.reports.training_views import Word, neighbors, shown_pairs
from declip.supervision.nearest_neighbor import Queue
from reports.conftest import plan

COLOURS = ["red", "green", "blue", "yellow"]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
PLAN = plan(MEAN, STD)


class _Words:
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
        ([0.9, 0.1, 0.0], 2, 3, 1),  # yellow, reworded in epoch 2
        ([0.8, 0.2, 0.0], 1, 3, 0),  # yellow again, further
        ([0.0, 0.0, 1.0], 1, 2, 0),  # blue
        size=4,
    )
    found = neighbors(model, queue, painted(COLOURS), _Words(), np.random.default_rng(0), shown=4)
    assert found is not None
    red = next(row for row in found.rows if row.words == "red")
    assert [each.words for each in red.found] == ["yellow of epoch 2 reworded", "blue of epoch 1"]
    assert red.found[0].cosine == pytest.approx(0.9 / 0.82**0.5, abs=2e-3)
    assert [each.image.alt for each in red.found] == ["yellow", "blue"]
    assert found.sampled == 4
    # red, blue and yellow find themselves; green finds an entry of yellow's.
    assert (found.same_pair, found.same_words) == (0.75, 0.0)


def test_the_same_words_of_another_pair(model, painted) -> None:
    captions = [("red",), ("red",), ("blue",), ("blue",)]

    class Plain:
        def words(self, tag: int, view: int) -> str:
            return captions[tag % 4][0]

    queue = _queue(([1.0, 0.0, 0.0], 0, 1, 0))
    found = neighbors(model, queue, painted(COLOURS, captions), Plain(), np.random.default_rng(0))
    assert found is not None
    # The only entry is pair 1: itself for 1, the same words for 0, other words for both blues.
    assert (found.same_pair, found.same_words) == (0.25, 0.25)
    assert {row.words: [each.same for each in row.found] for row in found.rows}["blue"] == [False]


def test_entries_without_a_tag_are_not_shown(model, painted) -> None:
    queue = Queue(4, 3)
    queue.push(torch.eye(3))
    assert neighbors(model, queue, painted(COLOURS), _Words(), np.random.default_rng(0)) is None


def test_views_are_unnormalized_and_texts_decoded(painted) -> None:
    tokenizer = Tokenizer(context=16, merges=4000)
    gray = torch.full((2, 1, 3, 8, 8), 0.0)
    gray[1] = 1.0
    ids = tokenizer.encode("a red cat sat")
    masked, labels = list(ids), [-100] * len(ids)
    cat, sat = (tokenizer.encode(word)[1] for word in ("cat", "sat"))
    masked[ids.index(cat)], labels[ids.index(cat)] = tokenizer.mask, cat
    masked[ids.index(sat)], labels[ids.index(sat)] = cat, sat
    changed = tokenizer.encode("a cat red sat")
    assert len(changed) == len(ids)
    batch = PairBatch(
        views={"first": gray[0], "second": gray[1]},
        texts=torch.tensor([[ids], [changed]]),
        masked=torch.tensor([masked]),
        labels=torch.tensor([labels]),
        sample_ids=torch.tensor([4 + 1]),
    )
    (pair,) = shown_pairs(batch, painted(COLOURS), PLAN, tokenizer, np.random.default_rng(0))
    assert pair.original is not None
    assert pair.original.alt == "green"
    assert _pixel(pair.views[0].src) == pytest.approx(tuple(round(255 * m) for m in MEAN), abs=1)
    second = tuple(min(255, round(255 * (m + s))) for m, s in zip(MEAN, STD, strict=True))
    assert _pixel(pair.views[1].src) == pytest.approx(second, abs=1)
    assert pair.caption == [Word("a red cat sat")]
    assert "".join(word.text for word in pair.augmented or []) == "acatredsat"
    assert [word.text for word in pair.augmented or [] if word.mark] in (["cat"], ["red"])
    assert [word for word in pair.masked or [] if word.mark] == [
        Word("mask", "masked", "cat"),
        Word("cat", "swapped", "sat"),
    ]


def _pixel(src: str) -> tuple[int, ...]:
    return Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))).getpixel((3, 3))
