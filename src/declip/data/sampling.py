"""The pairs of each step, in order: a pure function of the seed and the step.

The seed (seed, epoch, i) belongs to pair i (see `Assembler`), (seed, epoch, pairs) to the permutation of an epoch, and
longer ones to everything below.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from declip.data.pair import PairSource

SHUFFLE_BUFFER = 50_000  # pairs shuffled together where shards are remote: five of img2dataset's shards
BLOCKS_STREAM, GROUP_STREAM, WITHIN_STREAM = 1, 2, 3


class Order(ABC):
    """Batches by step; `steps_per_epoch` is the number of complete batches in an epoch."""

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.steps_per_epoch = size // batch_size
        self._kept: dict[Any, np.ndarray] = {}

    def generator(self, epoch: int, *stream: int) -> np.random.Generator:
        """The random numbers for one purpose."""
        return np.random.default_rng((self.seed, epoch, self.size, *stream))

    @abstractmethod
    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch_size,) int64."""

    @abstractmethod
    def epoch(self, epoch: int) -> np.ndarray:
        """All pairs of an epoch in their order, int64; the last ones may fill no batch."""


def build_order(source: PairSource, batch_size: int, seed: int, shuffle_buffer: int | None) -> Order:
    """Choose the order of a source's pairs: so many are shuffled together, all by default, fewer of remote shards."""
    if shuffle_buffer is None and source.remote:
        shuffle_buffer = SHUFFLE_BUFFER
    if shuffle_buffer is None:
        return ShuffledOrder(len(source), batch_size, seed)
    return BufferedOrder(len(source), batch_size, seed, source.shards(), shuffle_buffer)


class ShuffledOrder(Order):
    """All pairs of an epoch, permuted by (seed, epoch, size); the order of one epoch is held, 8 bytes a pair."""

    def indices(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._kept:
            # The third number is not the index of a pair, so no pair shares this stream.
            _keep(self._kept, epoch, self.generator(epoch).permutation(self.size), 1)
        return self._kept[epoch]


def _keep(kept: dict[Any, Any], key: object, value: object, most: int) -> None:
    while len(kept) >= most:
        kept.pop(next(iter(kept)))
    kept[key] = value


class BufferedOrder(Order):
    """Shards in an order sampled for each epoch; the pairs of a group of consecutive shards are permuted together.

    An epoch has groups of at least `buffer` pairs. The pairs of a shard that is split between two groups are permuted
    first, so that chance decides which fall on either side. Memory grows with the number of shards, `blocks`, alone.
    """

    def __init__(self, size: int, batch_size: int, seed: int, blocks: np.ndarray, buffer: int) -> None:
        super().__init__(size, batch_size, seed)
        self.blocks, self._starts = blocks, np.cumsum(blocks) - blocks
        self.groups = max(1, size // max(buffer, batch_size))
        # (groups + 1,), number of pairs before each group; Python's integers cannot overflow.
        self._borders = np.array([group * size // self.groups for group in range(self.groups + 1)])
        self._shard_orders: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def indices(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        first, last = place * self.batch_size, (place + 1) * self.batch_size
        group = int(np.searchsorted(self._borders, first, "right")) - 1
        pieces: list[np.ndarray] = []
        while first < last:
            start, stop = self._borders[group : group + 2]
            pieces.append(self.group(epoch, group)[first - start : min(last, stop) - start])
            first, group = min(last, stop), group + 1
        return np.concatenate(pieces)

    def epoch(self, epoch: int) -> np.ndarray:
        return np.concatenate([self.group(epoch, group) for group in range(self.groups)])

    def group(self, epoch: int, group: int) -> np.ndarray:
        """The pairs of a group in their order, int64."""
        if (epoch, group) not in self._kept:
            pairs = self._slice(epoch, *self._borders[group : group + 2].tolist())
            _keep(self._kept, (epoch, group), self.generator(epoch, GROUP_STREAM, group).permutation(pairs), 2)
        return self._kept[epoch, group]

    def _slice(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The pairs from `start` to `stop`, counted along the shards in the epoch's order."""
        if epoch not in self._shard_orders:
            order = self.generator(epoch, BLOCKS_STREAM).permutation(len(self.blocks))
            _keep(self._shard_orders, epoch, (order, np.cumsum(self.blocks[order])), 2)
        shards, ends = self._shard_orders[epoch]
        pieces: list[np.ndarray] = []
        place = int(np.searchsorted(ends, start, "right"))
        while start < stop:
            shard, end = int(shards[place]), int(ends[place])
            length = int(self.blocks[shard])
            first, last = start - (end - length), min(stop, end) - (end - length)
            pairs = int(self._starts[shard]) + np.arange(length)
            if last - first < length:
                pairs = self.generator(epoch, WITHIN_STREAM, shard).permutation(pairs)[first:last]
            pieces.append(pairs)
            start, place = min(stop, end), place + 1
        return np.concatenate(pieces)
