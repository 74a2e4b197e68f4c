"""Pairs of other sources: some of one, by a seed, a list or a split, or all of several."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from declip.data.columns import Columns
from declip.data.pair import BrokenPair, OnDemand, Pair, PairSource, locate, printable
from declip.data.sources.names import absolute, relative, resolve, stored_path
from declip.data.sources.rows import cell_name
from declip.errors import UserError
from declip.io.atomic import write_text

LIST_KIND = ".pairs"
COLUMN = "split"
# Names of splits in folders and tables, in any case.
SPLITS: Mapping[str, Sequence[str]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "dev"),
    "test": ("test", "testing"),
}
NUMBER_OF = {name: number for number, names in enumerate(SPLITS.values()) for name in names}
UNREADABLE = -1  # in every split, since it is not known in which
UNKNOWN = -2  # in none


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
    if count > (size := len(source)):
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
        self.credit = _listed(source.credit for source in self.sources)
        self.captions_from = _listed(source.captions_from for source in self.sources)
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


def _listed(texts: Iterable[str]) -> str:
    """Different texts in one line, without empty ones."""
    return "; ".join(dict.fromkeys(filter(None, texts)))


def groups_of(source: PairSource) -> np.ndarray:
    """The group of each pair, (n,) int64: equal for pairs that show the same thing, 0 if unknown."""
    if "group" in source.columns:
        return source.columns["group"]
    return np.zeros(len(source), np.int64)


class PairList(NamedTuple):
    """A list of pairs of a source: its name, columns and size, rising indices, and a digest of some of their keys."""

    source: str
    columns: Columns
    total: int
    indices: list[int]
    digest: str = ""

    def of(self, source: PairSource, where: Path) -> Subset:
        """The listed pairs of the opened source; `where` names the list if they are others now."""
        now = ""
        if len(source) != self.total:
            now = f"{len(source):,}"
        elif self.digest and self.digest_in(source) != self.digest:
            now = "others, or these in another order"
        if now:
            problem = f"'{where}' lists pairs of '{self.source}' when it had {self.total:,}; now it has {now}."
            raise UserError(f"{problem} Write the list again in another folder.")
        return Subset(source, np.array(self.indices, np.int64))

    def digest_in(self, source: PairSource) -> str:
        """Hash of up to 64 keys that a source has at the listed indices."""
        keys = list[str]()
        for index in self.indices[:: max(1, len(self.indices) // 32)]:
            with suppress(BrokenPair):
                keys.append(source[index].key)
        joined = "\n".join(keys).encode("utf-8", "surrogatepass")
        return hashlib.blake2b(joined, digest_size=8).hexdigest()


def list_of(spec: str, columns: Columns, source: PairSource, indices: Iterable[int]) -> PairList:
    """A list of pairs of the opened source `spec`; for a list of pairs, it refers to the source of that."""
    listed = PairList(spec, columns, len(source), [])
    positions: Sequence[int] = range(len(source))
    if spec.lower().endswith(LIST_KIND) and isinstance(source, Subset):
        listed = read_pair_list(Path(spec).expanduser())
        source = source.source
        positions = listed.indices
    listed = listed._replace(indices=[positions[index] for index in indices])
    digest = "" if source.remote else listed.digest_in(source)  # its keys would have to be fetched
    return listed._replace(digest=digest)


Lists = Mapping[str, PairList]
"""Lists of pairs by the paths of their files, which may not be written yet."""
NO_LISTS: Lists = MappingProxyType({})


def write_pair_list(path: Path, listed: PairList) -> None:
    """Write a list of pairs, with paths that stay valid when the project moves, see `relative`."""
    columns = asdict(listed.columns)
    columns["root"] = stored_path(columns["root"], path.parent) or None
    source = relative(absolute(listed.source), path.parent)
    fields = listed._asdict() | {"source": source, "columns": columns}
    write_text(path, json.dumps(fields) + "\n")


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
        if columns.root:
            columns = replace(columns, root=resolve(str(columns.root), path.parent))
        listed = listed._replace(source=resolve(listed.source, path.parent), columns=columns)
        indices = np.asarray(listed.indices)
        steps = np.diff(indices, prepend=-1, append=listed.total)
        rising = indices.dtype == np.int64 and (steps > 0).all()
        names = (listed.source, columns.image, columns.group or "", columns.root or "")
        texts = all(isinstance(name, str) for name in names)
        if rising and texts and not listed.source.lower().endswith(LIST_KIND):  # no list of itself
            return listed
    except (OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        pass
    raise UserError(
        f"'{path}' is not a list of pairs that declip wrote. Pass the pairs themselves."
    )


def numbers_of(cells: pa.ChunkedArray, number_of: Callable[[Any], int], missing: int) -> np.ndarray:
    """A number for each cell, (n,) int64: equal cells are looked at once; null and lists are `missing`."""
    kind = cells.type
    if pa.types.is_nested(kind):
        return np.full(len(cells), missing, np.int64)
    if pa.types.is_dictionary(kind):
        cells = cells.cast(kind.value_type)
    encoded = cells.dictionary_encode().combine_chunks()
    numbers = [number_of(value) for value in encoded.dictionary.to_pylist()]
    rows = encoded.indices.fill_null(len(numbers)).to_numpy(zero_copy_only=False)
    return np.array([*numbers, missing], np.int64)[rows]


def group_number(cell: Any) -> int:
    """A hash of a group's cell, 63 bits; 0 where the cell is empty."""
    if not (name := cell_name(cell).strip()):
        return 0
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1 | 1


def split_number(name: Any) -> int:
    """The number of a split in `SPLITS` by its name in a folder or a cell; `UNKNOWN` for other names."""
    return NUMBER_OF.get(str(name).strip().lower(), UNKNOWN)


def split_numbers(cells: pa.ChunkedArray, where: str, missing: int = UNKNOWN) -> np.ndarray:
    """The numbers of the splits that cells name, (n,) int64; all are `UNKNOWN` if none names one."""
    numbers = numbers_of(cells, split_number, missing)
    unknown = np.flatnonzero(numbers == UNKNOWN)
    if not (numbers >= 0).any():
        return np.full(len(numbers), UNKNOWN)
    if len(unknown):  # test pairs could be trained on
        other = printable(cell_name(cells[int(unknown[0])].as_py()))
        raise UserError(
            f"{where} has '{other}'. Write {', '.join(SPLITS)} there, or rename the column."
        )
    return numbers


def splits_of(source: PairSource) -> dict[str, np.ndarray]:
    """Rising indices of the pairs of each split that has some; pairs with the number `UNREADABLE` are in each."""
    numbers = source.columns.get("split")
    if numbers is None:
        return {}
    splits = {}
    for number, name in enumerate(SPLITS):
        own = numbers == number
        if own.any():
            splits[name] = np.flatnonzero(own | (numbers == UNREADABLE))
    return splits


def training_part(source: PairSource) -> PairSource:
    """The pairs to train on: all, or those of the split "train" where the source has splits."""
    splits = splits_of(source)
    if splits and "train" not in splits:
        problem = f"'{source.name}' has no training pairs: its splits are {', '.join(splits)}."
        raise UserError(
            f"{problem} Name some rows 'train', or rename the column '{COLUMN}' to train on all."
        )
    if not splits or len(splits["train"]) == len(source):
        return source
    return Subset(source, splits["train"], f"{source.name} (train)")
