"""A part of a source, chosen by a seed: for learning curves over the number of pairs."""

import numpy as np

from declip.data.images.lazy import UndecodedPair, read_lazy
from declip.data.pair import Pair, PairSource
from declip.errors import UserError


class Subset:
    """Some pairs of another source, in a fixed order.

    Args:
        source: Where the pairs are.
        indices: (n,) int, their places, rising where the source has shards.
    """

    def __init__(self, source: PairSource, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.name = f"{source.name}[{len(indices)}]"
        self.remote = getattr(source, "remote", False)
        """Whether the source has shards that have to be fetched."""
        blocks = getattr(source, "blocks", None)
        ends = np.cumsum([] if blocks is None else blocks)
        self.blocks = None if blocks is None else np.bincount(np.searchsorted(ends, indices, "right"), None, len(ends))
        """How many of the pairs are in each of the source's shards, None where it has none."""

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Pair:
        """Raises BrokenPair as the source does."""
        return self.source[int(self.indices[index])]

    def read_lazy(self, index: int) -> UndecodedPair:
        """The pair with its picture as little decoded as the source can; raises `BrokenPair`."""
        return read_lazy(self.source, int(self.indices[index]))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a pair, without its image."""
        return self.source.captions(int(self.indices[index]))


def take(source: PairSource, count: int, seed: int) -> Subset:
    """Choose pairs without replacement; a larger count keeps all that a smaller one chose.

    Raises:
        UserError: the source has fewer.
    """
    if count > len(source):
        raise UserError(f"data.max_pairs={count}, but '{source.name}' has {len(source)}. Ask for at most that many.")
    order = np.random.default_rng((seed, len(source))).permutation(len(source))
    return Subset(source, np.sort(order[:count]))
