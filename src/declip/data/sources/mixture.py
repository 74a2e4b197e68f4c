"""Several sources as one, each with a weight: how often an epoch shows each of its pairs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from declip.data.images.lazy import UndecodedPair, read_lazy
from declip.data.sampling import Part, blocks_of
from declip.data.sources.subset import Subset
from declip.errors import UserError

if TYPE_CHECKING:
    from declip.data.pair import Pair, PairSource

LARGEST_WEIGHT = 1000
EXACT = 1e-9
"""A fraction of a weight below this is a rounding error, such as in 3 * 0.1."""


@dataclass(frozen=True)
class Weighted:
    """A source and its weight."""

    source: "PairSource"
    weight: float


class Mixture:
    """Pairs of several sources, those of a source with weight w shown w times an epoch.

    Its indices are copies of the sources laid end to end. Weight 2.25 makes three copies: two that are shown whole, so
    that each time a pair gets views of its own, and one of which a quarter is shown, another one each epoch. So `len`
    counts the indices, and `shown` the pairs of an epoch.

    Args:
        sources: The sources and their weights.

    Attributes:
        parts: A part for each copy, for the order of an epoch.
        shown: Pairs that an epoch shows.
        distinct: Pairs of the sources, copies not counted.
        remote: Whether any source has shards that have to be fetched.

    Raises:
        UserError: There is no source, or a weight is not above 0 and at most 1000.
    """

    def __init__(self, sources: Sequence[tuple["PairSource", float]]) -> None:
        self.sources = [Weighted(source, weight) for source, weight in sources]
        if not self.sources:
            raise UserError("A mixture needs one source or more.")
        copies: list[tuple[PairSource, int]] = []
        for each in self.sources:
            if not 0 < each.weight <= LARGEST_WEIGHT:
                raise UserError(
                    f"The weight of '{each.source.name}' is {each.weight}; it must be above 0 and at most "
                    f"{LARGEST_WEIGHT}."
                )
            whole = math.floor(each.weight + EXACT)
            part = max(1, round((each.weight - whole) * len(each.source))) if each.weight - whole > EXACT else 0
            copies += [(each.source, len(each.source))] * whole + [(each.source, part)] * (part > 0)
        self._copies = [source for source, _ in copies]
        self._ends = np.cumsum([len(source) for source in self._copies])
        starts = [0, *self._ends[:-1].tolist()]
        self.parts = [Part(s, blocks_of(source), shown) for s, (source, shown) in zip(starts, copies, strict=True)]
        self.distinct = sum(len(each.source) for each in self.sources)
        self.shown = sum(part.shown for part in self.parts)
        self.remote = any(getattr(each.source, "remote", False) for each in self.sources)
        self.name = " + ".join(
            each.source.name if each.weight == 1 else f"{each.weight:g} × {each.source.name}" for each in self.sources
        )

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> "Pair":
        """Raises BrokenPair as the source does."""
        source, inner = self.locate(index)
        return source[inner]

    def read_lazy(self, index: int) -> UndecodedPair:
        """The pair with its picture as little decoded as its source can; raises `BrokenPair`."""
        return read_lazy(*self.locate(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of a pair, without its image."""
        source, inner = self.locate(index)
        return source.captions(inner)

    def locate(self, index: int) -> tuple["PairSource", int]:
        """The source of an index, and the pair's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        copy = int(np.searchsorted(self._ends, index, "right"))
        return self._copies[copy], index - self.parts[copy].start

    def __reduce__(self) -> tuple[type["Mixture"], tuple[object, ...]]:
        """Pickled as its sources."""
        return Mixture, ([(each.source, each.weight) for each in self.sources],)

    def take(self, count: int, seed: int) -> "Mixture":
        """Choose pairs of all sources without replacement, the weights left alone.

        A larger count keeps all that a smaller one chose; a source of which none is chosen goes.

        Raises:
            UserError: The sources have fewer.
        """
        sizes = [len(each.source) for each in self.sources]
        if count > self.distinct:
            raise UserError(
                f"data.max_pairs={count}, but '{self.name}' has {self.distinct}. Ask for at most that many."
            )
        order = np.random.default_rng((seed, self.distinct)).permutation(self.distinct)
        ends = np.cumsum(sizes)
        places = np.sort(order[:count])
        cut = np.split(places, np.searchsorted(places, ends[:-1]))
        return Mixture(
            [
                (Subset(each.source, inner - (end - size)), each.weight)
                for each, inner, end, size in zip(self.sources, cut, ends, sizes, strict=True)
                if len(inner)
            ]
        )
