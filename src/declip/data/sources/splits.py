"""Splits that a source names itself: a column "split" of a table, or folders named train, val and test."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from declip.data.pair import PairSource, printable
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
UNREADABLE, UNKNOWN = -1, -2


def split_numbers(cells: pa.Array | pa.ChunkedArray, where: str) -> np.ndarray | None:
    """Map cells (n,) to numbers of `SPLITS`, `UNREADABLE` where a cell is null; None if no cell names a split.

    Raises:
        UserError: Some cells name a split and others do not, so that test pairs could be trained on.
    """
    encoded = cells.dictionary_encode()
    encoded = encoded.combine_chunks() if isinstance(encoded, pa.ChunkedArray) else encoded
    names = encoded.dictionary.to_pylist()
    number_of = np.array([NUMBER_OF.get(name.strip().lower(), UNKNOWN) for name in names] + [UNREADABLE])
    if not (number_of >= 0).any():
        return None
    if (number_of == UNKNOWN).any():
        other = next(name for name, number in zip(names, number_of, strict=False) if number == UNKNOWN)
        raise UserError(
            f"{where} has '{printable(other)}' beside names of splits. Write {', '.join(SPLITS)} into each row, or "
            "rename the column."
        )
    return number_of[encoded.indices.fill_null(len(names)).to_numpy(zero_copy_only=False)]


def places_by_split(numbers: np.ndarray | None) -> dict[str, np.ndarray]:
    """Rising places of the pairs of each split that has some, by the pairs' numbers (n,); `UNREADABLE` is in each."""
    if numbers is None:
        return {}
    shared = numbers == UNREADABLE
    return {
        name: np.flatnonzero(shared | (numbers == number))
        for number, name in enumerate(SPLITS)
        if (numbers == number).any()
    }


def training_part(source: PairSource) -> PairSource:
    """The pairs to train on: all, or those of the split "train" where the source has splits.

    Raises:
        UserError: The source has splits, but none to train on.
    """
    splits = source.splits()
    if not splits:
        return source
    if "train" not in splits:
        raise UserError(
            f"'{source.name}' has no training pairs: its splits are {', '.join(splits)}. Name some rows 'train', or "
            f"rename the column '{COLUMN}' to train on all."
        )
    train = splits["train"]
    return source if len(train) == len(source) else Subset(source, train, f"{source.name} (train)")
