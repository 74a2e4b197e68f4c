"""The pairs of each step, in order: a pure function of the seed and the step.

Streams of random numbers are separated by their seeds: (seed, epoch, i) with i below the number of pairs belongs to
pair i (see `Assembler`), (seed, epoch, pairs) to the whole permutation, and five numbers to everything below.
"""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from declip.data.pair import PairSource, Span

SHUFFLE_BUFFER = 50_000
"""Default number of pairs shuffled together where shards are remote: five of img2dataset's shards."""

GROUPS_KEPT = 2
BLOCKS_STREAM, GROUP_STREAM, WITHIN_STREAM, RESAMPLE_STREAM = 1, 2, 3, 4


class Order(ABC):
    """Batches by step; `steps_per_epoch` is the number of whole batches among the pairs that an epoch shows."""

    resamples = False  # whether a pair can come again in an epoch

    def __init__(self, spans: list[Span], size: int, batch_size: int, seed: int) -> None:
        self.spans, self.size, self.batch_size, self.seed = spans, size, batch_size, seed
        self.shown = sum(span.shown for span in spans)
        self.steps_per_epoch = self.shown // batch_size
        self._kept: dict[Any, np.ndarray] = {}

    def generator(self, epoch: int, *stream: int) -> np.random.Generator:
        """The random numbers for one purpose."""
        return np.random.default_rng((self.seed, epoch, self.size, *stream))

    @abstractmethod
    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch_size,) int64."""

    def view_epoch(self, step: int) -> int:
        """The number that seeds the views of a step's pairs: no pair is in two batches of the same number."""
        return step if self.resamples else step // self.steps_per_epoch

    def epoch(self, epoch: int) -> np.ndarray:
        """All pairs of an epoch in their order, int64; the last ones may fill no batch."""
        steps = range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
        return np.concatenate([self.indices(step) for step in steps])


def build_order(source: PairSource, batch_size: int, seed: int, shuffle_buffer: int | None, resample: bool) -> Order:
    """Choose the order of a source's pairs: `shuffle_buffer` pairs are shuffled together, shard by shard.

    None shuffles all, or `SHUFFLE_BUFFER` where shards are remote. `resample` samples the pairs of each step anew.
    """
    if shuffle_buffer is None and source.remote:
        shuffle_buffer = SHUFFLE_BUFFER
    options = source.spans(), len(source), batch_size, seed
    if shuffle_buffer is not None:
        return (ResampledBuffers if resample else BufferedOrder)(*options, shuffle_buffer)
    return (ResampledOrder if resample else ShuffledOrder)(*options)


class ShuffledOrder(Order):
    """All pairs of an epoch, permuted by (seed, epoch, size); the order of one epoch is held, 8 bytes a pair."""

    def indices(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[place * self.batch_size : (place + 1) * self.batch_size]

    def epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._kept:
            # The third number is no pair's index: no pair shares this stream.
            generator = self.generator(epoch)
            if all(span.shown == span.length for span in self.spans):
                order = generator.permutation(self.size)
            else:
                order = generator.permutation(np.concatenate([_shown(span, generator) for span in self.spans]))
            _keep(self._kept, epoch, order, 1)
        return self._kept[epoch]


def _shown(span: Span, generator: np.random.Generator) -> np.ndarray:
    """The pairs of a span that an epoch shows, int64."""
    if span.shown == span.length:
        return span.start + np.arange(span.length)
    return span.start + generator.permutation(span.length)[: span.shown]


def _keep(kept: dict[Any, Any], key: object, value: object, most: int) -> None:
    """Add to the latest values."""
    while len(kept) >= most:
        kept.pop(next(iter(kept)))
    kept[key] = value


class BufferedOrder(Order):
    """Shards in an order sampled for each epoch; the pairs of a group of consecutive shards are permuted together.

    An epoch is divided into groups of at least `buffer` pairs. Each span gives every group the same fraction of its
    pairs, so that a mixture is mixed everywhere. The pairs of a shard that lies across the border of two groups are
    permuted first, so that chance decides which fall on either side, or are not shown. Memory does not grow with the
    length of an epoch.
    """

    def __init__(self, spans: list[Span], size: int, batch_size: int, seed: int, buffer: int) -> None:
        super().__init__(spans, size, batch_size, seed)
        # Each span's part is rounded down, so a group may lack a pair of each.
        self.groups = max(1, self.shown // max(buffer, batch_size + len(spans)))
        # (groups + 1, spans), number of pairs of a span before each group; Python's integers cannot overflow.
        self._before = np.array([[g * span.shown // self.groups for span in spans] for g in range(self.groups + 1)])
        self._borders = self._before.sum(1)
        self._starts = [span.start + np.cumsum(span.blocks) - span.blocks for span in spans]
        self._shard_orders: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

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
            pairs = [
                self._slice(epoch, span, int(start), int(stop))
                for span, (start, stop) in enumerate(self._before[group : group + 2].T)
            ]
            permuted = self.generator(epoch, GROUP_STREAM, group).permutation(np.concatenate(pairs))
            _keep(self._kept, (epoch, group), permuted, GROUPS_KEPT)
        return self._kept[epoch, group]

    def _slice(self, epoch: int, span: int, start: int, stop: int) -> np.ndarray:
        """The pairs of a span from `start` to `stop`, counted along its shards in the epoch's order."""
        blocks, ends = self._shard_order(epoch, span)
        pieces: list[np.ndarray] = [np.empty(0, np.int64)]
        place = int(np.searchsorted(ends, start, "right"))
        while start < stop:
            block, end = int(blocks[place]), int(ends[place])
            length = int(self.spans[span].blocks[block])
            first, last = start - (end - length), min(stop, end) - (end - length)
            pairs = int(self._starts[span][block]) + np.arange(length)
            if last - first < length:
                pairs = self.generator(epoch, WITHIN_STREAM, span, block).permutation(pairs)[first:last]
            pieces.append(pairs)
            start, place = min(stop, end), place + 1
        return np.concatenate(pieces)

    def _shard_order(self, epoch: int, span: int) -> tuple[np.ndarray, np.ndarray]:
        """A span's shards in the order of an epoch, and the end of each in it."""
        if (epoch, span) not in self._shard_orders:
            blocks = self.generator(epoch, BLOCKS_STREAM, span).permutation(len(self.spans[span].blocks))
            order = blocks, np.cumsum(self.spans[span].blocks[blocks])
            _keep(self._shard_orders, (epoch, span), order, 2 * len(self.spans))  # this epoch's and another's
        return self._shard_orders[epoch, span]


class ResampledOrder(Order):
    """Each step samples its batch from all pairs without replacement, a span in proportion to its pairs per epoch."""

    resamples = True

    def indices(self, step: int) -> np.ndarray:
        generator = self.generator(step, RESAMPLE_STREAM, 0)
        places = generator.choice(self.shown, self.batch_size, replace=False)
        ends = np.cumsum([span.shown for span in self.spans])
        counts = np.bincount(np.searchsorted(ends, places, "right"), minlength=len(ends))
        pairs = [
            span.start + generator.choice(span.length, count, replace=False)
            for span, count in zip(self.spans, counts.tolist(), strict=True)
        ]
        return generator.permutation(np.concatenate(pairs))


class ResampledBuffers(BufferedOrder):
    """As `ResampledOrder`, but some consecutive steps sample from the same shards: those of a group."""

    resamples = True

    def indices(self, step: int) -> np.ndarray:
        time = step // max(1, self.steps_per_epoch // self.groups)  # each time a group of another epoch is taken
        group = int(self.generator(time, RESAMPLE_STREAM, 1).integers(self.groups))
        return self.generator(step, RESAMPLE_STREAM, 2).choice(self.group(time, group), self.batch_size, replace=False)

    def epoch(self, epoch: int) -> np.ndarray:
        return Order.epoch(self, epoch)
