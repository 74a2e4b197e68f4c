"""The order of an epoch: every pair once, shard by shard where asked, a function of the seed and the step."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from conftest import refuses
from declip.data.loader import Order
from declip.data.pair import PairSource
from declip.data.sources.subset import Joined, take


class Numbers(PairSource):
    """A source that is only as long as it is."""

    def __init__(self, count, blocks=None, remote=False, name="numbers"):
        self.count, self.blocks, self.remote, self.name = count, blocks and np.array(blocks), remote, name

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return self.name, index

    def captions(self, index):
        return (f"{self.name} {index}",)


SIZES = [30, 7, 0, 55, 41, 1, 66, 23, 19, 60]
SHARDS = Numbers(sum(SIZES), SIZES)


def epoch_of(order, epoch):
    return np.concatenate([order.group(epoch, group) for group in range(order.groups)])


def steps(order, first, last):
    return np.concatenate([order.indices(step) for step in range(first, last)])


def test_the_default_is_the_permutation_that_runs_were_trained_with():
    order = Order(SHARDS, 8, 5, None)
    for epoch in (0, 3):
        whole = np.random.default_rng((5, epoch, 302)).permutation(302)
        assert epoch_of(order, epoch).tolist() == whole.tolist()
        assert steps(order, 37 * epoch, 37 * epoch + 37).tolist() == whole[:296].tolist()
    assert order.steps_per_epoch == 37


@pytest.mark.parametrize("buffer", [1, 40, 100, 1000])
@pytest.mark.parametrize("source", [SHARDS, Numbers(302), Numbers(2500)])
def test_every_pair_comes_once_an_epoch_in_another_order(source, buffer):
    order = Order(source, 8, 5, buffer)
    orders = [epoch_of(order, epoch) for epoch in range(2)]
    assert all(sorted(each.tolist()) == list(range(len(source))) for each in orders)
    assert (orders[0] != orders[1]).mean() > 0.9
    assert steps(order, 0, order.steps_per_epoch).tolist() == orders[0][: order.steps_per_epoch * 8].tolist()


def test_a_stretch_of_steps_touches_the_shards_of_a_group_only():
    source = Numbers(20_000, [100] * 200)
    order = Order(source, 50, 5, 1000)
    for first in range(0, order.steps_per_epoch, 20):
        shards = {index // 100 for index in steps(order, first, first + 20).tolist()}
        assert len(shards) <= 11
    together = epoch_of(order, 0)[:1000]
    assert np.abs(np.diff(together // 100)).mean() > 30  # of ten shards from all over the source, mixed


def test_pairs_left_out_at_an_epochs_end_are_chance():
    source = Numbers(105, [35, 35, 35])
    order, left = Order(source, 50, 5, 20), Counter()
    for epoch in range(600):
        left.update(epoch_of(order, epoch)[100:].tolist())
    assert len(left) == 105
    assert chisquare(list(left.values())).pvalue > 1e-4


def test_remote_shards_are_buffered_unless_told_otherwise():
    near, far = Numbers(120_000, [1000] * 120), Numbers(120_000, [1000] * 120, remote=True)
    for source, buffer, shards in ((near, None, 120), (far, None, 60), (far, 10_000, 20)):
        first = epoch_of(Order(source, 8, 5, buffer), 0)[:20_000]
        assert len({*(first // 1000).tolist()}) == shards


PARTS = [Numbers(100, [30, 70], name="a"), Numbers(40, name="b"), Numbers(60, [60], name="c")]


@pytest.mark.parametrize("buffer", [None, 50, 150])
def test_an_epoch_shows_each_pair_of_a_source_as_often_as_the_source_is_given(buffer):
    joined = Joined([*PARTS, PARTS[0]])
    order = Order(joined, 8, 5, buffer)
    assert (len(joined), order.steps_per_epoch) == (300, 300 // 8)
    for epoch in range(3):
        shown = Counter(joined[index] for index in epoch_of(order, epoch).tolist())
        assert shown == {(part.name, i): 1 + (part.name == "a") for part in PARTS for i in range(len(part))}


def test_shards_of_joined_sources_come_in_one_random_order():
    joined = Joined([Numbers(9000, [900] * 10, name="a"), Numbers(8000, name="b")])
    order = Order(joined, 100, 5, 2000)
    shares = [sum(joined[i][0] == "b" for i in steps(order, s, s + 20).tolist()) for s in range(0, 160, 20)]
    assert len({*shares}) > 1
    assert 0.2 < np.mean(shares) / 2000 < 0.8


def test_joined_sources_follow_each_other_and_pairs_are_taken_of_all():
    joined = Joined([Numbers(5, name="a"), Numbers(5, name="a"), Numbers(3, name="b")])
    assert [joined[i] for i in range(13)] == [("a", i % 5) for i in range(10)] + [("b", i) for i in range(3)]
    assert (joined.captions(11), joined.name) == (("b 1",), "a + a + b")
    with pytest.raises(IndexError):
        joined[13]
    joined = Joined(PARTS)
    small, large = take(joined, 50, seed=1), take(joined, 120, seed=1)
    chosen = [{one[i] for i in range(len(one))} for one in (small, large)]
    assert len(small) == len(chosen[0]) == 50
    assert chosen[0] <= chosen[1]
    shards = np.searchsorted([30, 100, 140, 200], small.indices, "right")
    assert small.shards().tolist() == np.bincount(shards).tolist()
    refuses("has 200", take, joined, 201, seed=1)
