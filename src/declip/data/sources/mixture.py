"""Several sources as one, each with a weight: how often an epoch shows each of its pairs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from declip.data.pair import PairSource, Span
from declip.data.sources.subset import DerivedSource, Subset, choose

EXACT = 1e-9  # A fraction of a weight below this is a rounding error, such as in 3 * 0.1


class Weighted(NamedTuple):
    source: PairSource
    weight: float


class Mixture(DerivedSource):
    """Pairs of several sources; an epoch shows those of a source with weight w w times.

    Its indices are copies of the sources one after the other: weight 2.25 makes two copies that are shown completely
    and one of which a quarter is shown. So `len` counts the indices, `shown` the pairs of an epoch, `distinct` those of
    the sources.
    """

    def __init__(self, sources: Sequence[tuple[PairSource, float]]) -> None:
        self.sources = [Weighted(*entry) for entry in sources]
        copies: list[tuple[PairSource, int]] = []
        for source, weight in self.sources:
            whole = math.floor(weight + EXACT)
            rest = max(1, round((weight - whole) * len(source))) if weight - whole > EXACT else 0
            copies += [(source, len(source))] * whole + [(source, rest)] * (rest > 0)
        self._copies = [source for source, _ in copies]
        self._ends = np.cumsum([len(source) for source in self._copies])
        self._starts = [0, *self._ends[:-1].tolist()]
        self._shown = [shown for _, shown in copies]
        self.shown = sum(self._shown)
        self.distinct = sum(len(source) for source, _ in self.sources)
        self.remote = any(source.remote for source, _ in self.sources)
        self.group_column = next((source.group_column for source, _ in self.sources if source.group_column), None)
        self.credit = "; ".join(dict.fromkeys(source.credit for source, _ in self.sources if source.credit))
        self.name = " + ".join(s.name if weight == 1 else f"{weight:g} × {s.name}" for s, weight in self.sources)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def spans(self) -> list[Span]:
        copies = zip(self._copies, self._starts, self._shown, strict=True)
        return [Span(start, source.spans()[0].blocks, shown) for source, start, shown in copies]

    def locate(self, index: int) -> tuple[PairSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        copy = int(np.searchsorted(self._ends, index, "right"))
        return self._copies[copy], index - self._starts[copy]

    def take(self, count: int, seed: int) -> "Mixture":
        """Choose pairs of all sources (see `choose`), the weights unchanged; a source without any is dropped."""
        places = choose(self.name, self.distinct, count, seed)
        parts: list[tuple[PairSource, float]] = []
        start = 0
        for source, weight in self.sources:
            low, high = np.searchsorted(places, (start, start + len(source)))
            if high > low:
                parts.append((Subset(source, places[low:high] - start), weight))
            start += len(source)
        return Mixture(parts)
