"""The order of an epoch: every pair once, shard by shard where asked, a function of the seed and the step."""

from collections import Counter

import numpy as np
import pytest
from scipy.stats import binomtest, chisquare

from declip.data.pair import PairSource
from declip.data.sampling import Order, build_order
from declip.data.sources.mixture import Mixture
from declip.errors import UserError


class Numbers(PairSource):
    """A source that is only as long as it is."""

    def __init__(self, count: int, blocks: list[int] | None = None, remote: bool = False, name: str = "numbers"):
        self.count, self.remote, self.name = count, remote, name
        self.blocks = None if blocks is None else np.array(blocks)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index):
        return self.name, index

    def captions(self, index):
        return (f"{self.name} {index}",)


SIZES = [30, 7, 0, 55, 41, 1, 66, 23, 19, 60]
SHARDS = Numbers(sum(SIZES), SIZES)


def order_of(source, batch=8, buffer=None) -> Order:
    return build_order(source, batch, 5, buffer)


def steps(order: Order, first: int, last: int) -> np.ndarray:
    return np.concatenate([order.indices(step) for step in range(first, last)])


def test_the_default_is_the_permutation_that_runs_were_trained_with():
    order = order_of(SHARDS)
    for epoch in (0, 3):
        whole = np.random.default_rng((5, epoch, 302)).permutation(302)
        assert order.epoch(epoch).tolist() == whole.tolist()
        assert steps(order, 37 * epoch, 37 * epoch + 37).tolist() == whole[:296].tolist()
    assert order.steps_per_epoch == 37


@pytest.mark.parametrize("buffer", [1, 40, 100, 1000])
@pytest.mark.parametrize("source", [SHARDS, Numbers(302), Numbers(2500)])
def test_every_pair_comes_once_an_epoch_in_another_order(source, buffer):
    order = order_of(source, buffer=buffer)
    orders = [order.epoch(epoch) for epoch in range(2)]
    assert all(sorted(each.tolist()) == list(range(len(source))) for each in orders)
    assert (orders[0] != orders[1]).mean() > 0.9
    assert steps(order, 0, order.steps_per_epoch).tolist() == orders[0][: order.steps_per_epoch * 8].tolist()


def test_a_stretch_of_steps_touches_the_shards_of_a_group_only():
    source = Numbers(20_000, [100] * 200)
    order = order_of(source, batch=50, buffer=1000)
    for first in range(0, order.steps_per_epoch, 20):
        shards = {index // 100 for index in steps(order, first, first + 20).tolist()}
        assert len(shards) <= 11
    together = order.epoch(0)[:1000]
    assert np.abs(np.diff(together // 100)).mean() > 30  # of ten shards from all over the source, mixed


def test_pairs_left_out_at_an_epochs_end_are_chance():
    source = Numbers(105, [35, 35, 35])
    order, left = order_of(source, batch=50, buffer=20), Counter()
    for epoch in range(600):
        left.update(order.epoch(epoch)[100:].tolist())
    assert len(left) == 105
    assert chisquare(list(left.values())).pvalue > 1e-4


def test_remote_shards_are_buffered_unless_told_otherwise():
    near, far = Numbers(120_000, [1000] * 120), Numbers(120_000, [1000] * 120, remote=True)
    assert len({i // 1000 for i in order_of(near).epoch(0)[:20_000].tolist()}) == 120
    assert len({i // 1000 for i in order_of(far).epoch(0)[:20_000].tolist()}) == 60
    assert len({i // 1000 for i in order_of(far, buffer=10_000).epoch(0)[:20_000].tolist()}) == 20


# Mixtures

PARTS = [(Numbers(100, [30, 70], name="a"), 2.25), (Numbers(40, name="b"), 0.5), (Numbers(60, [60], name="c"), 1)]


@pytest.mark.parametrize("buffer", [None, 50, 150])
def test_a_weight_is_how_often_an_epoch_shows_each_pair(buffer):
    mixture = Mixture(PARTS)
    assert (len(mixture), mixture.shown) == (3 * 100 + 40 + 60, 225 + 20 + 60)
    order = order_of(mixture, buffer=buffer)
    assert order.steps_per_epoch == 305 // 8
    drawn = Counter()
    for epoch in range(200):
        indices = order.epoch(epoch).tolist()
        assert len(set(indices)) == len(indices) == 305
        shown = Counter(mixture[index] for index in indices)
        assert {shown["a", i] for i in range(100)} == {2, 3}
        assert {shown["b", i] for i in range(40)} <= {0, 1}
        assert all(shown["c", i] == 1 for i in range(60))
        drawn.update(dict(shown))
    halves = [drawn["b", i] for i in range(40)]
    assert sum(halves) == 200 * 20
    assert all(binomtest(count, 200, 0.5).pvalue > 1e-5 for count in halves)
    assert all(drawn["a", i] > 400 for i in range(100))


def test_a_mixture_is_mixed_in_every_stretch():
    mixture = Mixture([(Numbers(9000, [900] * 10, name="a"), 1), (Numbers(1000, [500] * 2, name="b"), 1)])
    order = order_of(mixture, batch=100, buffer=1000)
    shares = [sum(mixture[i][0] == "b" for i in steps(order, s, s + 10).tolist()) for s in range(0, 100, 10)]
    assert shares == [100] * 10


@pytest.mark.parametrize("sizes", [[13] * 5, [9], [3, 3, 3], [1, 1, 1, 5, 100]])
def test_a_group_holds_a_batch_of_any_mixture(sizes):
    mixture = Mixture([(Numbers(size, name=str(size)), 1) for size in sizes])
    order = order_of(mixture, buffer=1)
    assert set(np.concatenate([order.epoch(epoch) for epoch in range(3)]).tolist()) == set(range(sum(sizes)))


def test_a_mixture_of_whole_weights_is_a_permutation_of_its_copies():
    mixture = Mixture([(Numbers(5, name="a"), 2), (Numbers(3, name="b"), 1)])
    assert [mixture[i] for i in range(13)] == [("a", i % 5) for i in range(10)] + [("b", i) for i in range(3)]
    assert mixture.captions(11) == ("b 1",)
    assert mixture.name == "2 × a + b"
    assert Mixture([(Numbers(10), 0.001)]).shown == 1, "a tiny weight still shows a pair"
    assert len(Mixture([(Numbers(10), 0.1 * 3 / 0.3)])) == 10, "rounding makes no copy"
    with pytest.raises(IndexError):
        mixture[13]


def test_pairs_are_taken_of_all_sources():
    mixture = Mixture(PARTS)
    small, large = mixture.take(50, seed=1), mixture.take(120, seed=1)
    chosen = [{each[i] for each in (m.sources[k].source,) for i in range(len(each))}
              for m in (small, large) for k in range(3)]  # fmt: skip
    assert sum(map(len, chosen[:3])) == 50
    assert all(one <= other for one, other in zip(chosen[:3], chosen[3:], strict=True))
    assert [each.weight for each in small.sources] == [2.25, 0.5, 1]
    assert small.sources[0].source.blocks.sum() == len(small.sources[0].source)
    with pytest.raises(UserError, match="has 200"):
        mixture.take(201, seed=1)
