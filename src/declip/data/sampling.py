"""Which pairs each step shows, in which order: a pure function of the seed and the step.

Streams of random numbers are told apart by their seeds: (seed, epoch, i) with i below the number of pairs belongs to
pair i (see `Assembler`), (seed, epoch, pairs) to the whole permutation, and five numbers to all that is below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from declip.data.checks import check_range

if TYPE_CHECKING:
    from declip.data.pair import PairSource

SHUFFLE_BUFFER = 50_000
"""Pairs shuffled at a time where shards have to be fetched and nothing is said: five of img2dataset's shards."""

BLOCK = 1000
"""Pairs that are moved together where a source has no shards of its own."""

GROUPS_KEPT = 2
BLOCKS_STREAM, GROUP_STREAM, WITHIN_STREAM, DRAW_STREAM = 1, 2, 3, 4


@dataclass(frozen=True)
class Part:
    """A stretch of a source's indices.

    Attributes:
        start: The first index.
        blocks: int64, the pairs of each of its shards; together its length.
        shown: How many of its pairs an epoch shows, drawn anew for each epoch where these are not all.
    """

    start: int
    blocks: np.ndarray
    shown: int

    @property
    def length(self) -> int:
        """The number of its indices."""
        return int(self.blocks.sum())


def parts_of(source: PairSource) -> list[Part]:
    """The parts of a source: a mixture's own, else one that holds all its pairs, each shown once."""
    parts: list[Part] | None = getattr(source, "parts", None)
    return [Part(0, blocks_of(source), len(source))] if parts is None else parts


def blocks_of(source: PairSource) -> np.ndarray:
    """The pairs of each shard of a source, or equal blocks where it has no shards; int64."""
    blocks: np.ndarray | None = getattr(source, "blocks", None)
    if blocks is not None:
        return np.asarray(blocks, np.int64)
    whole, rest = divmod(len(source), BLOCK)
    return np.array([BLOCK] * whole + [rest] * (rest > 0), np.int64)


class Order(Protocol):
    """Batches by step."""

    steps_per_epoch: int
    """Whole batches among the pairs that an epoch shows."""

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch,) int64."""
        ...

    def draw(self, step: int) -> int:
        """The number that seeds the views of a step's pairs: no pair is in two batches of the same number."""
        ...

    def epoch(self, epoch: int) -> np.ndarray:
        """All pairs of an epoch in their order, int64; the last ones may fill no batch."""
        ...


def build_order(source: PairSource, batch: int, seed: int, shuffle_buffer: int | None, resample: bool) -> Order:
    """Choose the order.

    Args:
        source: Where pairs come from.
        batch: Pairs a step.
        seed: Not negative.
        shuffle_buffer: Pairs that are shuffled at a time, shard after shard. None: all pairs, or `SHUFFLE_BUFFER` where
            shards have to be fetched.
        resample: Whether each step draws its pairs anew instead of showing each once an epoch.

    Raises:
        UserError: The buffer is below 1.
    """
    if shuffle_buffer is None and getattr(source, "remote", False):
        shuffle_buffer = SHUFFLE_BUFFER
    if shuffle_buffer is not None:
        check_range("shuffle_buffer", shuffle_buffer, 1)
        buffered = BufferedOrder(parts_of(source), len(source), batch, seed, shuffle_buffer)
        return BufferedDraws(buffered) if resample else buffered
    order = Draws if resample else WholeOrder
    return order(parts_of(source), len(source), batch, seed)


class WholeOrder:
    """All pairs of an epoch, permuted by (seed, epoch, size).

    An epoch's order is held: 8 bytes a pair in each process.

    Args:
        parts: Of the source.
        size: Its number of indices.
        batch: Pairs a step.
        seed: Not negative.
    """

    def __init__(self, parts: list[Part], size: int, batch: int, seed: int) -> None:
        self._parts, self._size, self._batch, self._seed = parts, size, batch, seed
        self.steps_per_epoch = sum(part.shown for part in parts) // batch
        self._held: tuple[int, np.ndarray] | None = None  # of the epoch last asked for

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch,) int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return self.epoch(epoch)[place * self._batch : (place + 1) * self._batch]

    def draw(self, step: int) -> int:
        """The step's epoch."""
        return step // self.steps_per_epoch

    def epoch(self, epoch: int) -> np.ndarray:
        """All pairs of an epoch in their order, int64."""
        if self._held is None or self._held[0] != epoch:
            # The third number is no pair's index: no pair shares this stream.
            generator = np.random.default_rng((self._seed, epoch, self._size))
            self._held = epoch, self._permuted(generator)
        return self._held[1]

    def _permuted(self, generator: np.random.Generator) -> np.ndarray:
        if all(part.shown == part.length for part in self._parts):
            return generator.permutation(self._size)
        return generator.permutation(np.concatenate([_shown(part, generator) for part in self._parts]))


def _shown(part: Part, generator: np.random.Generator) -> np.ndarray:
    """The pairs of a part that an epoch shows, int64."""
    if part.shown == part.length:
        return part.start + np.arange(part.length)
    return part.start + generator.permutation(part.length)[: part.shown]


class BufferedOrder:
    """Shards in an order drawn for each epoch; the pairs of a group of consecutive ones are permuted together.

    An epoch is cut into groups of at least `buffer` pairs. Each part gives every group the same share of its pairs,
    so that a mixture is mixed everywhere. The pairs of a shard that a group's border cuts are permuted before, so
    that which of them fall on a side, or are not shown, is chance. Nothing as long as an epoch is held.

    Args:
        parts: Of the source.
        size: Its number of indices.
        batch: Pairs a step.
        seed: Not negative.
        buffer: Pairs of a group, at least.
    """

    def __init__(self, parts: list[Part], size: int, batch: int, seed: int, buffer: int) -> None:
        self.parts, self.size, self.batch, self.seed = parts, size, batch, seed
        shown = np.array([part.shown for part in parts], np.int64)
        self.steps_per_epoch = int(shown.sum()) // batch
        # Each part's share is rounded down, so a group may lack a pair of each.
        self.groups = max(1, int(shown.sum()) // max(buffer, batch + len(parts)))
        # (groups + 1, parts), how many pairs of a part come before each group; Python's integers cannot overflow.
        self._before = np.array([[g * int(n) // self.groups for n in shown] for g in range(self.groups + 1)])
        self._borders = self._before.sum(1)
        self._starts = [part.start + np.cumsum(part.blocks) - part.blocks for part in parts]
        self._held: dict[tuple[int, int], np.ndarray] = {}  # the groups last asked for
        self._shuffled: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch,) int64."""
        epoch, place = divmod(step, self.steps_per_epoch)
        first, last = place * self.batch, (place + 1) * self.batch
        group = int(np.searchsorted(self._borders, first, "right")) - 1
        found: list[np.ndarray] = []
        while first < last:
            start, stop = self._borders[group : group + 2]
            found.append(self.group(epoch, group)[first - start : min(last, stop) - start])
            first, group = min(last, stop), group + 1
        return np.concatenate(found)

    def draw(self, step: int) -> int:
        """The step's epoch."""
        return step // self.steps_per_epoch

    def epoch(self, epoch: int) -> np.ndarray:
        """All pairs of an epoch in their order, int64."""
        return np.concatenate([self.group(epoch, group) for group in range(self.groups)])

    def group(self, epoch: int, group: int) -> np.ndarray:
        """The pairs of a group in their order, int64."""
        if (epoch, group) not in self._held:
            found = [
                self._stretch(epoch, part, int(start), int(stop))
                for part, (start, stop) in enumerate(self._before[group : group + 2].T)
            ]
            permuted = self.generator(epoch, GROUP_STREAM, group).permutation(np.concatenate(found))
            while len(self._held) >= GROUPS_KEPT:
                self._held.pop(next(iter(self._held)))
            self._held[epoch, group] = permuted
        return self._held[epoch, group]

    def generator(self, epoch: int, stream: int, number: int) -> np.random.Generator:
        """The random numbers for one purpose."""
        return np.random.default_rng((self.seed, epoch, self.size, stream, number))

    def _stretch(self, epoch: int, part: int, start: int, stop: int) -> np.ndarray:
        """The pairs of a part from place `start` to `stop`, when its shards lie in the epoch's order."""
        blocks, ends = self._shards(epoch, part)
        found: list[np.ndarray] = [np.empty(0, np.int64)]
        place = int(np.searchsorted(ends, start, "right"))
        while start < stop:
            block, end = int(blocks[place]), int(ends[place])
            length = int(self.parts[part].blocks[block])
            first, last = start - (end - length), min(stop, end) - (end - length)
            pairs = int(self._starts[part][block]) + np.arange(length)
            if last - first < length:
                within = np.random.default_rng((self.seed, epoch, self.size, WITHIN_STREAM, part, block))
                pairs = within.permutation(pairs)[first:last]
            found.append(pairs)
            start, place = min(stop, end), place + 1
        return np.concatenate(found)

    def _shards(self, epoch: int, part: int) -> tuple[np.ndarray, np.ndarray]:
        """A part's shards in the order of an epoch, and where each ends in it."""
        if (epoch, part) not in self._shuffled:
            blocks = self.generator(epoch, BLOCKS_STREAM, part).permutation(len(self.parts[part].blocks))
            while len(self._shuffled) >= 2 * len(self.parts):  # of this epoch and another
                self._shuffled.pop(next(iter(self._shuffled)))
            self._shuffled[epoch, part] = blocks, np.cumsum(self.parts[part].blocks[blocks])
        return self._shuffled[epoch, part]


class Draws:
    """Each step draws its batch from all pairs, without replacement inside it; a part by the pairs it would show.

    Args:
        parts: Of the source.
        size: Its number of indices.
        batch: Pairs a step.
        seed: Not negative.
    """

    def __init__(self, parts: list[Part], size: int, batch: int, seed: int) -> None:
        self._parts, self._size, self._batch, self._seed = parts, size, batch, seed
        self._ends = np.cumsum([part.shown for part in parts])
        self.steps_per_epoch = int(self._ends[-1]) // batch

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch,) int64."""
        generator = np.random.default_rng((self._seed, step, self._size, DRAW_STREAM, 0))
        places = generator.choice(int(self._ends[-1]), self._batch, replace=False)
        of_part = np.bincount(np.searchsorted(self._ends, places, "right"), minlength=len(self._parts))
        drawn = [
            part.start + generator.choice(part.length, count, replace=False)
            for part, count in zip(self._parts, of_part.tolist(), strict=True)
        ]
        return generator.permutation(np.concatenate(drawn))

    def draw(self, step: int) -> int:
        """The step itself: a pair that is drawn again gets other views."""
        return step

    def epoch(self, epoch: int) -> np.ndarray:
        """The pairs of as many steps as show as many pairs as there are."""
        steps = range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
        return np.concatenate([self.indices(step) for step in steps])


class BufferedDraws:
    """As `Draws`, but some consecutive steps draw from the same shards: those of a group of an order.

    Args:
        order: The order; each time a group of another epoch of it is taken.
    """

    def __init__(self, order: BufferedOrder) -> None:
        self._order = order
        self.steps_per_epoch = order.steps_per_epoch
        self._steps = max(1, self.steps_per_epoch // order.groups)

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch,) int64."""
        time = step // self._steps
        group = int(self._order.generator(time, DRAW_STREAM, 1).integers(self._order.groups))
        pairs = self._order.group(time, group)
        return self._order.generator(step, DRAW_STREAM, 2).choice(pairs, self._order.batch, replace=False)

    def draw(self, step: int) -> int:
        """The step itself: a pair that is drawn again gets other views."""
        return step

    def epoch(self, epoch: int) -> np.ndarray:
        """The pairs of as many steps as show as many pairs as there are."""
        steps = range(epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch)
        return np.concatenate([self.indices(step) for step in steps])
