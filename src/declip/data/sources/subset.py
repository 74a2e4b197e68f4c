"""A subset of a source, chosen by a seed: for learning curves over the number of pairs."""

from abc import abstractmethod

import numpy as np
from PIL import Image

from declip.data.pair import LazyPair, Pair, PairSource
from declip.data.sources.origin import Origin
from declip.errors import UserError


class DerivedSource(PairSource):
    """Pairs that are read from other sources."""

    @abstractmethod
    def locate(self, index: int) -> tuple[PairSource, int]:
        """The source of pair `index`, and its index there."""

    def __getitem__(self, index: int) -> Pair:
        source, inner = self.locate(index)
        return source[inner]

    def read_lazy(self, index: int) -> LazyPair:
        source, inner = self.locate(index)
        return source.read_lazy(inner)

    def captions(self, index: int) -> tuple[str, ...]:
        source, inner = self.locate(index)
        return source.captions(inner)

    def key(self, index: int) -> str:
        source, inner = self.locate(index)
        return source.key(inner)

    def image(self, index: int) -> Image.Image:
        source, inner = self.locate(index)
        return source.image(inner)

    def origin(self, index: int) -> Origin:
        source, inner = self.locate(index)
        return source.origin(inner)


class Subset(DerivedSource):
    """Some pairs of another source, by (n,) indices in a fixed order, rising where the source has shards."""

    def __init__(self, source: PairSource, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.name = f"{source.name}[{len(indices)}]"
        self.credit, self.remote = source.credit, source.remote
        if source.blocks is not None:
            ends = np.cumsum(source.blocks)
            self.blocks = np.bincount(np.searchsorted(ends, indices, "right"), None, len(ends))

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> tuple[PairSource, int]:
        return self.source, int(self.indices[index])


def choose(name: str, size: int, count: int, seed: int) -> np.ndarray:
    """Choose pairs without replacement, rising; a larger count keeps all that a smaller one chose."""
    if count > size:
        raise UserError(f"data.max_pairs={count}, but '{name}' has {size}. Ask for at most that many.")
    return np.sort(np.random.default_rng((seed, size)).permutation(size)[:count])


def take(source: PairSource, count: int, seed: int) -> Subset:
    """Choose some pairs of a source, see `choose`."""
    return Subset(source, choose(source.name, len(source), count, seed))
