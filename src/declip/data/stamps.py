"""`builtin:stamps`: the stamps of Tux Paint, read from the cache that `prepare_stamps` makes.

Drawings and photographs cut out on white, each with a sentence: another source than emoji and icons, for transfer.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from declip.data.pair import BUILTIN_PREFIX
from declip.data.picture_cache import TABLE, Cache, PictureSource
from declip.errors import unknown

STAMPS = Cache("stamps", layout=1, effort="81 MB to fetch, about a minute")

SPLITS = {
    "stamps": "name",
    "stamps-photos": "name",
    "stamps-kinds": "kind",
    "stamps-kinds-train": "kind",
}
"""The column that holds the class, by the name of the source."""


class StampSource(PictureSource):
    """Stamps of one split, by path.

    Args:
        split: One of `SPLITS`: "stamps" and "stamps-photos" by name, all stamps that have one, or the photographs
            alone; "stamps-kinds" and "stamps-kinds-train" by kind, two parts that share no name.
        cache: Folder of the cache; None for the usual one.

    Attributes:
        labels: int64 (n,), the class of each stamp.
        class_names: The names or kinds, in alphabetical order.

    Raises:
        UserError: The cache is missing, damaged or of another layout.
    """

    def __init__(self, split: str, cache: str | Path | None = None) -> None:
        if split not in SPLITS:
            raise unknown("split of the stamps", split, SPLITS)
        self._arguments = (split, cache)
        folder, column = STAMPS.folder(cache), SPLITS[split]
        STAMPS.check(folder)
        table = [row for row in pq.read_table(folder / TABLE).to_pylist() if row[column]]
        if split == "stamps-photos":
            table = [row for row in table if row["photo"]]
        self.class_names = tuple(sorted({row[column] for row in table}))
        if column == "kind":
            table = [row for row in table if row["test"] == (split == "stamps-kinds")]
        super().__init__(BUILTIN_PREFIX + split, folder, table)
        numbers = {name: number for number, name in enumerate(self.class_names)}
        self.labels = np.array([numbers[row[column]] for row in table], dtype=np.int64)
        self.credit = "Tux Paint stamps by Bill Kendrick and contributors, GPL-2"

    def __reduce__(self) -> tuple[type["StampSource"], tuple[object, ...]]:
        """Pickled as what to open: the images stay in the file, shared by all processes."""
        return type(self), self._arguments


def open_stamps(split: str, cache: str | Path | None = None) -> StampSource:
    """Open one of `SPLITS`."""
    return StampSource(split, cache)
