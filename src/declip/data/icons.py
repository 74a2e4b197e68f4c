"""`builtin:icons`: icons by many designers, read from the cache that `prepare_icons` makes.

The same things drawn over and over, named and sorted by their designers. Some designers are kept for measuring, so a
test image is by a hand never seen in training; its name is one that training knows.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from declip.data.pair import BUILTIN_PREFIX
from declip.data.picture_cache import TABLE, Cache, PictureSource
from declip.errors import unknown

ICONS = Cache("icons", layout=1, effort="112 MB to fetch, about ten minutes")

SPLITS = {"icons": "train", "icons-validation": "validation", "icons-test": "test"}
"""The split of the table by the name of the source."""


class IconSource(PictureSource):
    """Icons of one split, by set and then in the set's own order.

    Args:
        split: One of `SPLITS`.
        cache: Folder of the cache; None for the usual one.

    Raises:
        UserError: The cache is missing, damaged or of another layout.
    """

    def __init__(self, split: str, cache: str | Path | None = None) -> None:
        if split not in SPLITS:
            raise unknown("split of the icons", split, SPLITS)
        self._arguments = (split, cache)
        folder = ICONS.folder(cache)
        ICONS.check(folder)
        table = pq.read_table(folder / TABLE).to_pylist()
        known = {row["name"] for row in table if row["split"] == "train"}
        rows = [row for row in table if row["split"] == SPLITS[split] and row["name"] in known]
        super().__init__(BUILTIN_PREFIX + split, folder, rows)
        sets = {row["set"]: f"{row['title']} by {row['author']}, {row['licence']}" for row in rows}
        self.credit = "; ".join(sets.values())

    def __reduce__(self) -> tuple[type["IconSource"], tuple[object, ...]]:
        """Pickled as what to open: the images stay in the file, shared by all processes."""
        return type(self), self._arguments


class IconClasses(IconSource):
    """A split for evaluation: the class of an icon is its name, and several icons may be of one class.

    Attributes:
        labels: int64 (n,), the class of each icon.
        class_names: The names, in alphabetical order.
    """

    def __init__(self, split: str, cache: str | Path | None = None) -> None:
        super().__init__(split, cache)
        names, labels = np.unique([row["name"] for row in self.rows], return_inverse=True)
        self.labels = labels.astype(np.int64)
        self.class_names = tuple(map(str, names))


def open_icons(split: str, cache: str | Path | None = None) -> IconSource:
    """Open one of `SPLITS`; those for evaluation have `labels` and `class_names`."""
    return IconSource(split, cache) if SPLITS.get(split) == "train" else IconClasses(split, cache)
