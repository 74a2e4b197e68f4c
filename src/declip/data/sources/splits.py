"""Splits and groups as numbers of the cells of a table, and the pairs of a split."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from declip.data.pair import PairSource, printable
from declip.data.sources.rows import cell_name
from declip.data.sources.subset import Subset
from declip.errors import UserError

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
    name = cell_name(cell).strip()
    if not name:
        return 0
    encoded = name.encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(encoded, digest_size=8).digest()
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
