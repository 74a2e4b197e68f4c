"""Several sources as one."""

from collections.abc import Sequence

import numpy as np

from declip.data.pair import PairSource
from declip.data.sources.subset import DerivedSource, Subset, choose


class Joined(DerivedSource):
    """The pairs of several sources, one source after the other; an epoch shows those of a source given twice twice."""

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self.sources])
        self.remote = any(source.remote for source in self.sources)
        self.group_column = next((source.group_column for source in self.sources if source.group_column), None)
        self.credit = "; ".join(dict.fromkeys(source.credit for source in self.sources if source.credit))
        self.name = " + ".join(source.name for source in self.sources)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def shards(self) -> np.ndarray:
        return np.concatenate([source.shards() for source in self.sources])

    def locate(self, index: int) -> tuple[PairSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, "right"))
        return self.sources[number], index - int(self._ends[number]) + len(self.sources[number])

    def take(self, count: int, seed: int) -> "Joined":
        """Choose pairs of all sources (see `choose`); a source without any is dropped."""
        places = choose(self.name, len(self), count, seed)
        parts: list[PairSource] = []
        for source, end in zip(self.sources, self._ends.tolist(), strict=True):
            start = end - len(source)
            low, high = np.searchsorted(places, (start, end))
            if high > low:
                parts.append(Subset(source, places[low:high] - start))
        return Joined(parts)
