"""Pairs of other sources: some of one, or all of several."""

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np

from declip.data.pair import OnDemand, Pair, PairSource, locate
from declip.errors import UserError


class Subset(PairSource):
    """Some pairs of another source, by (n,) indices in a fixed order, rising where the source has shards."""

    def __init__(self, source: PairSource, indices: np.ndarray, name: str | None = None) -> None:
        self.source = source
        self.indices = indices
        self.name = name or f"{source.name}[{len(indices)}]"
        self.credit = source.credit
        self.remote = source.remote
        self.captions_from = source.captions_from
        self.class_names = source.class_names
        self.columns = OnDemand({name: partial(self._column, name) for name in source.columns})
        self.cells = OnDemand({name: partial(self._cells, name) for name in source.cells})

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Pair:
        return self.source[int(self.indices[index])]

    def _column(self, name: str) -> np.ndarray:
        return self.source.columns[name][self.indices]

    def _cells(self, name: str) -> list[tuple[str, ...]]:
        cells = self.source.cells[name]
        return [cells[index] for index in self.indices.tolist()]

    def other_columns(self) -> dict[str, np.ndarray]:
        columns = self.source.other_columns()
        for name, numbers in columns.items():
            columns[name] = numbers[self.indices]
        return columns

    def shards(self) -> np.ndarray:
        ends = np.cumsum(self.source.shards())
        own = np.searchsorted(ends, self.indices, "right")
        return np.bincount(own, minlength=len(ends))


def take(source: PairSource, count: int, seed: int) -> Subset:
    """Choose pairs without replacement, rising; a larger count keeps all that a smaller one chose."""
    size = len(source)
    if count > size:
        raise UserError(
            f"data.max_pairs={count}, but '{source.name}' has {size}. Ask for at most that many."
        )
    order = np.random.default_rng((seed, size)).permutation(size)
    return Subset(source, np.sort(order[:count]))


class Joined(PairSource):
    """The pairs of several sources, one source after the other; an epoch shows those of a source given twice twice."""

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self.sources])
        self.name = " + ".join(source.name for source in self.sources)
        self.remote = any(source.remote for source in self.sources)
        self.credit = _list_texts(source.credit for source in self.sources)
        self.captions_from = _list_texts(source.captions_from for source in self.sources)
        if any("group" in source.columns for source in self.sources):
            self.columns = OnDemand({"group": self._groups})

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Pair:
        number, inner = locate(self._ends, index)
        return self.sources[number][inner]

    def _groups(self) -> np.ndarray:
        return np.concatenate([groups_of(source) for source in self.sources])

    def shards(self) -> np.ndarray:
        return np.concatenate([source.shards() for source in self.sources])


def _list_texts(texts: Iterable[str]) -> str:
    """Different texts in one line, without empty ones."""
    return "; ".join(dict.fromkeys(filter(None, texts)))


def groups_of(source: PairSource) -> np.ndarray:
    """The group of each pair, (n,) int64: equal for pairs that show the same thing, 0 if unknown."""
    if "group" in source.columns:
        return source.columns["group"]
    return np.zeros(len(source), np.int64)
