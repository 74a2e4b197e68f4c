"""A subset of a source: chosen by a seed, for learning curves over the number of pairs, or listed in a file."""

import hashlib
import json
from abc import abstractmethod
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from declip.data.columns import Columns
from declip.data.pair import BrokenPair, LazyPair, Origin, Pair, PairSource
from declip.data.sources.stored_paths import resolve, stored_path
from declip.errors import UserError
from declip.io.atomic import write_text

LIST_KIND = ".pairs"


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

    def group(self, index: int) -> int:
        source, inner = self.locate(index)
        return source.group(inner)

    def image(self, index: int) -> Image.Image:
        source, inner = self.locate(index)
        return source.image(inner)

    def origin(self, index: int) -> Origin:
        source, inner = self.locate(index)
        return source.origin(inner)


class Subset(DerivedSource):
    """Some pairs of another source, by (n,) indices in a fixed order, rising where the source has shards."""

    def __init__(self, source: PairSource, indices: np.ndarray, name: str | None = None) -> None:
        self.source, self.indices = source, indices
        self.name = name or f"{source.name}[{len(indices)}]"
        self.credit, self.remote, self.group_column = source.credit, source.remote, source.group_column
        if source.blocks is not None:
            ends = np.cumsum(source.blocks)
            self.blocks = np.bincount(np.searchsorted(ends, indices, "right"), None, len(ends))

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> tuple[PairSource, int]:
        return self.source, int(self.indices[index])

    def splits(self) -> dict[str, np.ndarray]:
        splits = {name: np.flatnonzero(np.isin(self.indices, places)) for name, places in self.source.splits().items()}
        return {name: places for name, places in splits.items() if len(places)}


def choose(name: str, size: int, count: int, seed: int) -> np.ndarray:
    """Choose pairs without replacement, rising; a larger count keeps all that a smaller one chose."""
    if count > size:
        raise UserError(f"data.max_pairs={count}, but '{name}' has {size}. Ask for at most that many.")
    return np.sort(np.random.default_rng((seed, size)).permutation(size)[:count])


def take(source: PairSource, count: int, seed: int) -> Subset:
    """Choose some pairs of a source, see `choose`."""
    return Subset(source, choose(source.name, len(source), count, seed))


class PairList(NamedTuple):
    """A file that lists pairs of a source: its name and columns, its number of pairs, and rising indices.

    `digest` is of some of their keys: a table that was sorted again has other keys at these places.
    """

    source: str
    columns: Columns
    total: int
    indices: list[int]
    digest: str = ""

    def digest_in(self, source: PairSource) -> str:
        """Hash of up to 64 keys that a source has at the listed places."""
        keys = []
        for index in self.indices[:: max(1, len(self.indices) // 32)]:
            with suppress(BrokenPair):
                keys.append(source.key(index))
        return hashlib.blake2b("\n".join(keys).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def write_pair_list(path: Path, listed: PairList, source: PairSource | None = None) -> None:
    """Write a list of pairs, with paths that stay valid when the project moves, see `stored_path`."""
    columns = replace(listed.columns, root=stored_path(listed.columns.root, path.parent) or None)
    listed = listed._replace(source=stored_path(listed.source, path.parent), columns=columns)
    if source is not None and not source.remote:  # whose keys would have to be fetched
        listed = listed._replace(digest=listed.digest_in(source))
    write_text(path, json.dumps(listed._asdict() | {"columns": asdict(columns)}) + "\n")


def read_pair_list(path: Path) -> PairList:
    """Read a list of pairs; raises `UserError` if the file is invalid."""
    try:
        listed = PairList(**json.loads(path.read_text("utf-8")))
        columns = Columns(**listed.columns)  # type: ignore[arg-type]
        columns = replace(columns, root=resolve(str(columns.root), path.parent) if columns.root else None)
        listed = listed._replace(source=resolve(listed.source, path.parent), columns=columns)
        places = np.asarray(listed.indices)
        rising = places.dtype == np.int64 and (np.diff(places, prepend=-1, append=listed.total) > 0).all()
        texts = all(isinstance(name, str) for name in (listed.source, *filter(None, asdict(listed.columns).values())))
        if rising and texts and not listed.source.lower().endswith(LIST_KIND):  # no list of itself
            return listed
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        pass
    raise UserError(f"'{path}' is not a list of pairs that `declip finetune` wrote. Pass the pairs themselves.")
