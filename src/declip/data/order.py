"""The order of the pairs in each epoch, a pure function of the seed and the epoch.

The seed (seed, epoch, pairs) belongs to the permutation of an epoch, and longer ones to groups of shards.
"""

from contextlib import suppress

import numpy as np
import pyarrow as pa

from declip.data.pair import PairSource
from declip.errors import UserError
from declip.io.atomic import remove
from declip.io.cache import cached_table, table_path

# Pairs shuffled together where shards are remote: five of img2dataset's shards
SHUFFLE_BUFFER = 50_000
BLOCKS_STREAM = 1
GROUP_STREAM = 2
SHARED_FROM = 1_000_000  # pairs from which a machine's processes share a permutation
ORDERS = "orders"  # its folder in the cache
Layout = tuple[np.ndarray, np.ndarray, np.ndarray]


class Order:
    """Batches by step: the pairs of an epoch, permuted by the seed; the last ones may fill no batch.

    With a buffer, as remote shards have by default, an epoch has the shards in a sampled order, and groups of them with
    about `buffer` pairs are permuted. Memory then grows with the number of shards alone.
    """

    def __init__(self, source: PairSource, batch_size: int, seed: int, buffer: int | None) -> None:
        if buffer is None and source.remote:
            buffer = SHUFFLE_BUFFER
        self.size = len(source)
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = self.size // batch_size  # complete batches
        self.buffered = buffer is not None
        self.blocks = np.array([self.size])
        if self.buffered:
            self.blocks = source.shards()
        group_size = max(buffer or self.size, batch_size)
        self.groups = max(1, self.size // group_size)
        # Cache of the order of the current epoch, and of its current group, which the next step needs too
        self._layout: dict[int, Layout] = {}
        self._group: dict[tuple[int, int], np.ndarray] = {}

    def generator(self, epoch: int, *stream: int) -> np.random.Generator:
        """The random numbers for one purpose; the third number is not the index of a pair, whose stream it would be."""
        return np.random.default_rng((self.seed, epoch, self.size, *stream))

    def indices(self, step: int) -> np.ndarray:
        """The pairs of a step's batch, (batch_size,) int64."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position * self.batch_size
        last = (position + 1) * self.batch_size
        *_, borders = self.layout(epoch)  # (groups + 1,)
        lowest = np.searchsorted(borders, first, "right") - 1
        parts = []
        end = np.searchsorted(borders, last)
        for number in range(lowest, end):
            start = borders[number]
            pairs = self.group(epoch, number)
            parts.append(pairs[max(0, first - start) : last - start])
        return np.concatenate(parts)

    def layout(self, epoch: int) -> Layout:
        """The shards in an epoch's order, and the numbers of shards and of pairs before each group, (groups + 1,)."""
        if epoch not in self._layout:
            shards = self.generator(epoch, BLOCKS_STREAM).permutation(len(self.blocks))
            ends = np.cumsum(self.blocks[shards])  # (shards,)
            # A group ends with the shard that completes its share of the pairs.
            shares = np.arange(1, self.groups + 1) * self.size // self.groups
            lasts = np.searchsorted(ends, shares)
            cuts = np.append(0, lasts + 1)
            borders = np.append(0, ends[lasts])
            self._layout = {epoch: (shards, cuts, borders)}
        return self._layout[epoch]

    def group(self, epoch: int, group: int) -> np.ndarray:
        """The pairs of a group in their order, int64."""
        if (epoch, group) in self._group:
            return self._group[epoch, group]
        if not self.buffered:
            order = self.shared_permutation(epoch)
        else:
            shards, cuts, _ = self.layout(epoch)
            starts = np.cumsum(self.blocks) - self.blocks
            pieces = [np.empty(0, np.int64)]
            for shard in shards[cuts[group] : cuts[group + 1]]:
                pieces.append(starts[shard] + np.arange(self.blocks[shard]))
            generator = self.generator(epoch, GROUP_STREAM, group)
            order = generator.permutation(np.concatenate(pieces))
        self._group = {(epoch, group): order}
        return order

    def permutation(self, epoch: int) -> np.ndarray:
        """All pairs in the order of an epoch, (size,) int64."""
        return self.generator(epoch).permutation(self.size)

    def shared_permutation(self, epoch: int) -> np.ndarray:
        """The order of an epoch; that of many pairs is computed by one process of the machine and memory-mapped."""
        if self.size < SHARED_FROM:
            return self.permutation(epoch)

        def make() -> tuple[pa.Schema, list[pa.RecordBatch]]:
            batch = pa.record_batch({"pair": self.permutation(epoch)})
            return batch.schema, [batch]

        try:
            table = cached_table(ORDERS, self._version(epoch), make)
        except UserError:  # the cache is full or read-only
            return self.permutation(epoch)
        # No process begins that epoch now; one that still reads it keeps its mapping.
        with suppress(OSError):
            remove(table_path(ORDERS, self._version(epoch - 2)))
        return table["pair"].chunk(0).to_numpy()

    def _version(self, epoch: int) -> tuple[object, ...]:
        """What a permutation depends on."""
        return np.__version__, self.seed, epoch, self.size
