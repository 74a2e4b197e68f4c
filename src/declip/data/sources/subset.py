"""Pairs of other sources: some of one, by a seed, a list or a split, or all of several."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, cast

import numpy as np
import pyarrow as pa

from declip.data.columns import Columns
from declip.data.pair import BrokenPair, LazyImage, LazyPair, Origin, Pair, PairSource, printable
from declip.data.sources.names import absolute, relative, resolve, stored_path
from declip.errors import UserError
from declip.io.atomic import write_text

LIST_KIND, COLUMN = ".pairs", "split"
# Names of splits in folders and tables, in any case.
SPLITS: Mapping[str, Sequence[str]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
NUMBER_OF = {name: number for number, names in enumerate(SPLITS.values()) for name in names}
UNREADABLE, UNKNOWN = -1, -2


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

    def column(self, name: str) -> list[tuple[str, ...]]:
        columns = dict[int, list[tuple[str, ...]]]()  # by source
        cells = []
        for index in range(len(self)):
            source, inner = self.locate(index)
            if id(source) not in columns:
                columns[id(source)] = source.column(name)
            cells.append(columns[id(source)][inner])
        return cells

    def other_columns(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        located = [self.locate(index) for index in indices]
        sources = {
            id(source): source for source, _ in located
        }  # columns of several tables are not compared
        inner = [index for _, index in located]
        return next(iter(sources.values())).other_columns(inner) if len(sources) == 1 else {}

    def lazy_image(self, index: int) -> LazyImage:
        source, inner = self.locate(index)
        return source.lazy_image(inner)

    def origin(self, index: int) -> Origin:
        source, inner = self.locate(index)
        return source.origin(inner)


class Subset(DerivedSource):
    """Some pairs of another source, by (n,) indices in a fixed order, rising where the source has shards."""

    def __init__(self, source: PairSource, indices: np.ndarray, name: str | None = None) -> None:
        self.source, self.indices = source, indices
        self.name = name or f"{source.name}[{len(indices)}]"
        self.credit = source.credit
        self.remote = source.remote
        self.group_column = source.group_column
        self.captions_from = source.captions_from
        self.column_names = source.column_names

    def __len__(self) -> int:
        return len(self.indices)

    def locate(self, index: int) -> tuple[PairSource, int]:
        return self.source, int(self.indices[index])

    def shards(self) -> np.ndarray:
        ends = np.cumsum(self.source.shards())
        return np.bincount(np.searchsorted(ends, self.indices, "right"), None, len(ends))

    def splits(self) -> dict[str, np.ndarray]:
        splits = {
            name: np.flatnonzero(np.isin(self.indices, indices))
            for name, indices in self.source.splits().items()
        }
        # Unreadable pairs are in every split: a split of these alone is none.
        return {
            name: rows
            for name, rows in splits.items()
            if len(rows)
            and not any(
                len(other) > len(rows) and np.isin(rows, other).all() for other in splits.values()
            )
        }


def take(source: PairSource, count: int, seed: int) -> Subset:
    """Choose pairs without replacement, rising; a larger count keeps all that a smaller one chose."""
    if count > (size := len(source)):
        raise UserError(
            f"data.max_pairs={count}, but '{source.name}' has {size}. Ask for at most that many."
        )
    return Subset(source, np.sort(np.random.default_rng((seed, size)).permutation(size)[:count]))


class Joined(DerivedSource):
    """The pairs of several sources, one source after the other; an epoch shows those of a source given twice twice."""

    def __init__(self, sources: Sequence[PairSource]) -> None:
        self.sources = list(sources)
        self._ends = np.cumsum([len(source) for source in self.sources])
        self.remote = any(source.remote for source in self.sources)
        self.group_column = next(
            (source.group_column for source in self.sources if source.group_column), None
        )
        self.credit = "; ".join(
            dict.fromkeys(source.credit for source in self.sources if source.credit)
        )
        self.captions_from = "; ".join(
            dict.fromkeys(filter(None, (each.captions_from for each in self.sources)))
        )
        self.name = " + ".join(source.name for source in self.sources)
        self.column_names = self.sources[0].column_names

    def __len__(self) -> int:
        return int(self._ends[-1])

    def shards(self) -> np.ndarray:
        return np.concatenate([source.shards() for source in self.sources])

    def locate(self, index: int) -> tuple[PairSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, "right"))
        return self.sources[number], index - int(self._ends[number]) + len(self.sources[number])


class PairList(NamedTuple):
    """A list of pairs of a source: its name, columns and size, rising indices, and a digest of some of their keys."""

    source: str
    columns: Columns
    total: int
    indices: list[int]
    digest: str = ""

    def of(self, source: PairSource, where: Path) -> Subset:
        """The listed pairs of the opened source; `where` names the list if they are others now."""
        if len(source) != self.total or (self.digest and self.digest_in(source) != self.digest):
            now = (
                f"{len(source):,}"
                if len(source) != self.total
                else "others, or these in another order"
            )
            problem = f"'{where}' lists pairs of '{self.source}' when it had {self.total:,}; now it has {now}."
            raise UserError(f"{problem} Write the list again in another folder.")
        return Subset(source, np.array(self.indices, np.int64))

    def digest_in(self, source: PairSource) -> str:
        """Hash of up to 64 keys that a source has at the listed indices."""
        keys = list[str]()
        for index in self.indices[:: max(1, len(self.indices) // 32)]:
            with suppress(BrokenPair):
                keys.append(source.key(index))
        return hashlib.blake2b(
            "\n".join(keys).encode("utf-8", "surrogatepass"), digest_size=8
        ).hexdigest()


def list_of(spec: str, columns: Columns, source: PairSource, indices: Iterable[int]) -> PairList:
    """A list of pairs of the opened source `spec`; for a list of pairs, it refers to the source of that."""
    listed = PairList(spec, columns, len(source), [])
    positions = cast(Sequence[int], range(len(source)))
    if spec.lower().endswith(LIST_KIND) and isinstance(source, Subset):
        listed, source = read_pair_list(Path(spec).expanduser()), source.source
        positions = listed.indices
    listed = listed._replace(indices=[positions[index] for index in indices])
    digest = "" if source.remote else listed.digest_in(source)  # its keys would have to be fetched
    return listed._replace(digest=digest)


Lists = Mapping[str, PairList]
"""Lists of pairs by the paths of their files, which may not be written yet."""
NO_LISTS: Lists = MappingProxyType({})


def write_pair_list(path: Path, listed: PairList) -> None:
    """Write a list of pairs, with paths that stay valid when the project moves, see `relative`."""
    columns = replace(listed.columns, root=stored_path(listed.columns.root, path.parent) or None)
    listed = listed._replace(source=relative(absolute(listed.source), path.parent), columns=columns)
    write_text(path, json.dumps(listed._asdict() | {"columns": asdict(columns)}) + "\n")


def write_others(
    path: Path, spec: str, columns: Columns, source: PairSource, excluded: Collection[int]
) -> int:
    """Write a list of the pairs of the opened source `spec` but some, and return their number."""
    others = [index for index in range(len(source)) if index not in excluded]
    if not others:
        raise UserError(
            f"'{path}' is not written: all pairs of '{source.name}' are excluded, and none is left."
        )
    write_pair_list(path, list_of(spec, columns, source, others))
    return len(others)


def read_pair_list(path: Path) -> PairList:
    """Read a list of pairs; raises `UserError` if the file is invalid."""
    try:
        listed = PairList(**json.loads(path.read_text("utf-8")))
        columns = Columns(**listed.columns)  # type: ignore[arg-type]
        columns = replace(
            columns, root=resolve(str(columns.root), path.parent) if columns.root else None
        )
        listed = listed._replace(source=resolve(listed.source, path.parent), columns=columns)
        indices = np.asarray(listed.indices)
        rising = (
            indices.dtype == np.int64
            and (np.diff(indices, prepend=-1, append=listed.total) > 0).all()
        )
        names = (listed.source, columns.image, columns.group or "", columns.root or "")
        texts = all(isinstance(name, str) for name in names)
        if rising and texts and not listed.source.lower().endswith(LIST_KIND):  # no list of itself
            return listed
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        pass
    raise UserError(
        f"'{path}' is not a list of pairs that declip wrote. Pass the pairs themselves."
    )


def split_numbers(cells: pa.Array | pa.ChunkedArray, where: str) -> np.ndarray | None:
    """Map cells (n,) to numbers of `SPLITS`, `UNREADABLE` where a cell is null; None if no cell names a split."""
    encoded = cells.dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    names = encoded.dictionary.to_pylist()
    number_of = np.array(
        [NUMBER_OF.get(name.strip().lower(), UNKNOWN) for name in names] + [UNREADABLE]
    )
    if not (number_of >= 0).any():
        return None
    if (number_of == UNKNOWN).any():  # test pairs could be trained on
        other = names[int((number_of == UNKNOWN).argmax())]
        raise UserError(
            f"{where} has '{printable(other)}'. Write {', '.join(SPLITS)} there, or rename the column."
        )
    return number_of[encoded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]


def indices_by_split(numbers: np.ndarray | None) -> dict[str, np.ndarray]:
    """Rising indices of the pairs of each split that has some, by the pairs' numbers (n,); `UNREADABLE` is in each."""
    masks = (
        {} if numbers is None else {name: numbers == number for number, name in enumerate(SPLITS)}
    )
    return {
        name: np.flatnonzero(where | (numbers == UNREADABLE))
        for name, where in masks.items()
        if where.any()
    }


def training_part(source: PairSource) -> PairSource:
    """The pairs to train on: all, or those of the split "train" where the source has splits."""
    splits = source.splits()
    if splits and "train" not in splits:
        problem = f"'{source.name}' has no training pairs: its splits are {', '.join(splits)}."
        raise UserError(
            f"{problem} Name some rows 'train', or rename the column '{COLUMN}' to train on all."
        )
    if not splits or len(splits["train"]) == len(source):
        return source
    return Subset(source, splits["train"], f"{source.name} (train)")
