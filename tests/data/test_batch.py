"""Pairs that cannot be used, and the batch: the shapes that it accepts, how it moves and is sliced."""

import pickle

import pytest
import torch

from conftest import refuses
from declip.data.batch import PHOTOMETRIC_WIDTH, PairBatch, View
from declip.data.pair import EXAMPLES_KEPT, BrokenPair, SkipCounter


def parts(**other):
    whole = {
        "views": {"first": torch.zeros(3, 3, 4, 4), "small": torch.zeros(3, 3, 2, 2)},
        "texts": torch.ones(2, 3, 8, dtype=torch.int64),
        "masked": torch.ones(3, 8, dtype=torch.int64),
        "labels": torch.full((3, 8), -100),
        "sample_ids": torch.arange(3),
    }
    return whole | other


def test_moving_takes_every_tensor_and_leaves_the_plan_of_the_work_on_the_host():
    broken = BrokenPair("missing image", "a.png")
    labels = torch.full((3, 8), -100)
    labels[0, 2] = labels[2, 5] = 7
    lengths = torch.tensor([[4, 8, 6], [4, 3, 6]])
    raw = View(torch.zeros(3, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, PHOTOMETRIC_WIDTH))
    batch = PairBatch(
        **parts(views={"first": raw}, labels=labels, lengths=lengths), skipped=[broken]
    )
    assert batch.mask_positions is None
    moved = batch.to("meta")
    for name in ("texts", "masked", "labels", "sample_ids", "mask_positions"):
        assert getattr(moved, name).device.type == "meta"
    assert moved.views["first"].pixels.device.type == "meta"
    assert batch.views["first"].pixels.device.type == "cpu"
    assert moved.views["first"].photometric is batch.views["first"].photometric
    assert moved.lengths is lengths
    assert moved.skipped == [broken]
    part = batch.to("cpu").rows(1, 3)
    assert (part.lengths.tolist(), part.mask_positions, part.skipped) == (
        [[8, 6], [3, 6]],
        None,
        [],
    )
    assert part.to("cpu").mask_positions.tolist() == [13]
    assert len(part.views["first"].photometric) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"views": {}}, "needs `texts`"),
        ({"texts": torch.ones(3, 8, dtype=torch.int64)}, "needs `texts`"),
        ({"texts": torch.ones(2, 4, 8, dtype=torch.int64)}, "needs `texts`"),
        ({"texts": torch.ones(2, 3, 8)}, r"`texts` is .*float32"),
        ({"masked": torch.ones(3, 7, dtype=torch.int64)}, r"`masked` is \(3, 7\).*\(3, 8\)"),
        ({"labels": torch.full((3, 8), -100, dtype=torch.int32)}, "`labels` is .*int32"),
        ({"sample_ids": torch.arange(4)}, r"`sample_ids` is \(4,\).*\(3,\)"),
    ],
)
def test_wrong_shapes_and_types_are_refused(given, says):
    refuses(says, PairBatch, **parts(**given))


def test_broken_pair_survives_pickling():
    again = pickle.loads(pickle.dumps(BrokenPair("missing image", "a.jpg", "no such file")))
    assert (again.reason, again.key, again.detail) == ("missing image", "a.jpg", "no such file")
    assert str(again) == "missing image: a.jpg (no such file)"
    hostile = BrokenPair("x", "\x1b[2J\u202egnp.\ud800\n" + "a" * 10_000)
    assert hostile.key.startswith("\ufffd[2J\ufffdgnp.\ufffd\ufffdaaa")
    assert (len(hostile.key), str(hostile).isprintable()) == (300, True)


def test_skip_counter_counts_all_and_keeps_few_examples():
    counter = SkipCounter()
    for number in range(9):
        counter.add(BrokenPair("missing image", f"{number}.jpg"))
        counter.add(BrokenPair("empty caption", "x"))
    assert counter.to_dict()["reasons"] == {
        "empty caption": {"count": 9, "examples": ["x"]},
        "missing image": {"count": 9, "examples": [f"{n}.jpg" for n in range(EXAMPLES_KEPT)]},
    }
    again = SkipCounter.from_dict(counter.to_dict())
    again.add(BrokenPair("empty caption", "y"))
    assert (again.total, counter.total) == (19, 18)
