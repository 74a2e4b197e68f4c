"""`builtin:clipart`: drawings of the Open Clip Art Library, read from the cache that `prepare_clipart` makes.

By many hands, each with a title and keywords: another source than emoji and icons, for transfer.
"""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from declip.data.pair import BUILTIN_PREFIX
from declip.data.picture_cache import TABLE, Cache, PictureSource
from declip.errors import unknown

CLIPART = Cache("clipart", layout=1, effort="25 MB to fetch, about a minute")


class ClipartSource(PictureSource):
    """All drawings, by path; the class of a drawing is its title, and several drawings may be of one class.

    Args:
        cache: Folder of the cache; None for the usual one.

    Attributes:
        labels: int64 (n,), the class of each drawing.
        class_names: The titles, in alphabetical order.

    Raises:
        UserError: The cache is missing, damaged or of another layout.
    """

    def __init__(self, cache: str | Path | None = None) -> None:
        self._cache = cache
        folder = CLIPART.folder(cache)
        CLIPART.check(folder)
        super().__init__(f"{BUILTIN_PREFIX}clipart", folder, pq.read_table(folder / TABLE).to_pylist())
        names, labels = np.unique([row["title"] for row in self.rows], return_inverse=True)
        self.labels = labels.astype(np.int64)
        self.class_names = tuple(map(str, names))
        self.credit = "Open Clip Art Library 0.18 and its contributors, public domain"

    def __reduce__(self) -> tuple[type["ClipartSource"], tuple[object, ...]]:
        """Pickled as what to open: the images stay in the file, shared by all processes."""
        return type(self), (self._cache,)


def open_clipart(split: str, cache: str | Path | None = None) -> ClipartSource:
    """Open the drawings; there is one split, "clipart"."""
    if split != "clipart":
        raise unknown("split of the clip art", split, ["clipart"])
    return ClipartSource(cache)
