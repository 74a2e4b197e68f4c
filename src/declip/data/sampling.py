"""The pairs of each step, in order: a pure function of the seed and the step.

Streams of random numbers are separated by their seeds: (seed, epoch, i) with i below the number of pairs belongs to
pair i (see `Assembler`), (seed, epoch, pairs) to the whole permutation, and five numbers to everything below.
"""

from abc import ABC, abstractmethod

import numpy as np

from declip.data.pair import PairSource, Span

SHUFFLE_BUFFER = 50_000
"""Default number of pairs shuffled together where shards are remote: five of img2dataset's shards."""

GROUPS_KEPT = 2
BLOCKS_STREAM, GROUP_STREAM, WITHIN_STREAM, RESAMPLE_STREAM = 1, 2, 3, 4


class Order(ABC):
    """Batches by step."""

    steps_per_epoch: int
    """Number of whole batches among the pairs of an epoch."""

    @abstractmethod
    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch_size,) int64."""

    def view_epoch(self, step: int) -> int:
        """The number that seeds the views of a step's pairs: no pair is in two batches of the same number."""
        return step // self.steps_per_epoch

    def epoch(self, epoch: int) -> np.ndarray:
        """All pairs of an epoch in their order, int64; the last ones may fill no batch."""
        steps = range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
        return np.concatenate([self.indices(step) for step in steps])


def build_order(source: PairSource, batch_size: int, seed: int, shuffle_buffer: int | None, resample: bool) -> Order:
    """Choose the order of a source's pairs.

    Args:
        shuffle_buffer: Number of pairs shuffled together, shard by shard. None: all, or `SHUFFLE_BUFFER` where shards
            are remote.
        resample: Sample the pairs of each step anew instead of showing each pair once an epoch.
    """
    if shuffle_buffer is None and source.remote:
        shuffle_buffer = SHUFFLE_BUFFER
    if shuffle_buffer is not None:
        buffered = BufferedOrder(source.spans(), len(source), batch_size, seed, shuffle_buffer)
        return ResampledBuffers(buffered) if resample else buffered
    return (ResampledOrder if resample else ShuffledOrder)(source.spans(), len(source), batch_size, seed)


class ShuffledOrder(Order):
    """All pairs of an epoch, permuted by (seed, epoch, size); the order of one epoch is held, 8 bytes a pair."""

    def __init__(self, spans: list[Span], size: int, batch_size: int, seed: int) -> None:
        self._spans, self._size, self._batch_size, self._seed = spans, size, batch_size, seed
        self.steps_per_epoch = sum(span.shown for span in spans) // batch_size
        self._latest: tuple[int, np.ndarray] | None = None

    def indices(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[place * self._batch_size : (place + 1) * self._batch_size]

    def epoch(self, epoch: int) -> np.ndarray:
        if self._latest is None or self._latest[0] != epoch:
            # The third number is no pair's index: no pair shares this stream.
            generator = np.random.default_rng((self._seed, epoch, self._size))
            self._latest = epoch, self._permuted(generator)
        return self._latest[1]

    def _permuted(self, generator: np.random.Generator) -> np.ndarray:
        if all(span.shown == span.length for span in self._spans):
            return generator.permutation(self._size)
        return generator.permutation(np.concatenate([_shown(span, generator) for span in self._spans]))


def _shown(span: Span, generator: np.random.Generator) -> np.ndarray:
    """The pairs of a span that an epoch shows, int64."""
    if span.shown == span.length:
        return span.start + np.arange(span.length)
    return span.start + generator.permutation(span.length)[: span.shown]


class BufferedOrder(Order):
    """Shards in an order sampled for each epoch; the pairs of a group of consecutive shards are permuted together.

    An epoch is divided into groups of at least `buffer` pairs. Each span gives every group the same fraction of its
    pairs, so that a mixture is mixed everywhere. The pairs of a shard that lies across the border of two groups are
    permuted first, so that chance decides which fall on either side, or are not shown. Memory does not grow with the
    length of an epoch.
    """

    def __init__(self, spans: list[Span], size: int, batch_size: int, seed: int, buffer: int) -> None:
        self.spans, self.size, self.batch_size, self.seed = spans, size, batch_size, seed
        shown = np.array([span.shown for span in spans], np.int64)
        self.steps_per_epoch = int(shown.sum()) // batch_size
        # Each span's part is rounded down, so a group may lack a pair of each.
        self.groups = max(1, int(shown.sum()) // max(buffer, batch_size + len(spans)))
        # (groups + 1, spans), number of pairs of a span before each group; Python's integers cannot overflow.
        self._before = np.array([[g * int(n) // self.groups for n in shown] for g in range(self.groups + 1)])
        self._borders = self._before.sum(1)
        self._starts = [span.start + np.cumsum(span.blocks) - span.blocks for span in spans]
        self._groups: dict[tuple[int, int], np.ndarray] = {}  # the latest ones
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
        if (epoch, group) not in self._groups:
            pairs = [
                self._slice(epoch, span, int(start), int(stop))
                for span, (start, stop) in enumerate(self._before[group : group + 2].T)
            ]
            permuted = self.generator(epoch, GROUP_STREAM, group).permutation(np.concatenate(pairs))
            while len(self._groups) >= GROUPS_KEPT:
                self._groups.pop(next(iter(self._groups)))
            self._groups[epoch, group] = permuted
        return self._groups[epoch, group]

    def generator(self, epoch: int, stream: int, number: int) -> np.random.Generator:
        """The random numbers for one purpose."""
        return np.random.default_rng((self.seed, epoch, self.size, stream, number))

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
                within = np.random.default_rng((self.seed, epoch, self.size, WITHIN_STREAM, span, block))
                pairs = within.permutation(pairs)[first:last]
            pieces.append(pairs)
            start, place = min(stop, end), place + 1
        return np.concatenate(pieces)

    def _shard_order(self, epoch: int, span: int) -> tuple[np.ndarray, np.ndarray]:
        """A span's shards in the order of an epoch, and the end of each in it."""
        if (epoch, span) not in self._shard_orders:
            blocks = self.generator(epoch, BLOCKS_STREAM, span).permutation(len(self.spans[span].blocks))
            while len(self._shard_orders) >= 2 * len(self.spans):  # this epoch's and another's
                self._shard_orders.pop(next(iter(self._shard_orders)))
            self._shard_orders[epoch, span] = blocks, np.cumsum(self.spans[span].blocks[blocks])
        return self._shard_orders[epoch, span]


class ResampledOrder(Order):
    """Each step samples its batch from all pairs without replacement, a span in proportion to its pairs per epoch."""

    def __init__(self, spans: list[Span], size: int, batch_size: int, seed: int) -> None:
        self._spans, self._size, self._batch_size, self._seed = spans, size, batch_size, seed
        self._ends = np.cumsum([span.shown for span in spans])
        self.steps_per_epoch = int(self._ends[-1]) // batch_size

    def indices(self, step: int) -> np.ndarray:
        generator = np.random.default_rng((self._seed, step, self._size, RESAMPLE_STREAM, 0))
        places = generator.choice(int(self._ends[-1]), self._batch_size, replace=False)
        counts = np.bincount(np.searchsorted(self._ends, places, "right"), minlength=len(self._spans))
        pairs = [
            span.start + generator.choice(span.length, count, replace=False)
            for span, count in zip(self._spans, counts.tolist(), strict=True)
        ]
        return generator.permutation(np.concatenate(pairs))

    def view_epoch(self, step: int) -> int:
        """The step itself: a pair that is sampled again gets other views."""
        return step


class ResampledBuffers(Order):
    """As `ResampledOrder`, but some consecutive steps sample from the same shards: those of a group of an order."""

    def __init__(self, order: BufferedOrder) -> None:
        self._order = order
        self.steps_per_epoch = order.steps_per_epoch
        self._steps = max(1, self.steps_per_epoch // order.groups)

    def indices(self, step: int) -> np.ndarray:
        time = step // self._steps  # each time a group of another epoch is taken
        group = int(self._order.generator(time, RESAMPLE_STREAM, 1).integers(self._order.groups))
        pairs = self._order.group(time, group)
        return self._order.generator(step, RESAMPLE_STREAM, 2).choice(pairs, self._order.batch_size, replace=False)

    def view_epoch(self, step: int) -> int:
        """The step itself: a pair that is sampled again gets other views."""
        return step
