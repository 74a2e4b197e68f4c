"""What has to be embedded: what is new in a source, what has changed, and what is there no longer."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from declip.data.sources.image_source import ImageSource


class Known(NamedTuple):
    """A row as far as finding its image again goes.

    Attributes:
        id: The row's.
        key: The image's.
        stamp: Its `Origin.stamp`.
    """

    id: int
    key: str
    stamp: str


@dataclass
class Changes:
    """How a source differs from the rows of an index.

    Attributes:
        places: (n,) int64, the images to embed, in the order of the source.
        digest: SHA-256 of their keys: the same for the same work.
        gone: Ids of rows to hide: their image is not there any more, or is to be embedded anew.
        back: Ids of hidden rows whose image is there again as it was.
    """

    places: np.ndarray
    digest: str
    gone: set[int] = field(default_factory=set)
    back: set[int] = field(default_factory=set)


def find_changes(
    source: ImageSource,
    places: Iterable[int],
    known: Iterable[Known],
    *,
    removed: Set[int] = frozenset(),
    gone: Set[int] = frozenset(),
    excluded: Set[str] = frozenset(),
) -> Changes:
    """Compare a source with what is embedded of it.

    An image is found again by its key and its stamp. One that the user took out is known by its key alone, so that it
    stays out when its file is written anew. Of images that share a key each stands for one row.

    Args:
        source: As it is now.
        places: All its places in order, perhaps with a progress bar.
        known: The rows of the index in the order of their ids.
        removed: Ids that the user took out.
        gone: Ids that are hidden already.
        excluded: Keys that stay out.
    """
    rows: dict[str, list[Known]] = defaultdict(list)
    for each in known:
        rows[each.key].append(each)
    todo: list[int] = []
    digest = hashlib.sha256()
    back: set[int] = set()
    for place in places:
        key = source.key(place)
        if key in excluded:
            continue
        row = _match(rows[key], source.origin(place).stamp, removed, gone) if key in rows else None
        if row is None:
            todo.append(place)
            digest.update(repr(key).encode())
        elif row.id in gone:
            back.add(row.id)
    left = {each.id for own in rows.values() for each in own}
    return Changes(np.array(todo, np.int64), digest.hexdigest(), left - removed - gone, back)


def _match(rows: list[Known], stamp: str, removed: Set[int], gone: Set[int]) -> Known | None:
    """Take the row of an image out of those of its key: a live one, else one taken out, else a hidden one."""
    fitting = [row for row in rows if row.id in removed or row.stamp == stamp]
    if not fitting:
        return None
    row = min(fitting, key=lambda row: (row.id in gone, row.id in removed, row.id))
    rows.remove(row)
    return row
