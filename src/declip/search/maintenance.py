"""Changing an index without embedding: taking images out, bringing them back, compaction, the approximate index."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from declip.data.pair import printable
from declip.errors import UserError
from declip.io.atomic import remove as remove_file
from declip.search.approximate import make, sample_queries, without_hidden
from declip.search.manifest import Approximate, Manifest, Part, held
from declip.search.parts import write_part
from declip.search.store import Store

PART_ROWS = 8_192
"""Rows of a part: what is lost at most when `embed` is killed."""


def remove(folder: Path, keys: Sequence[str]) -> int:
    """Hide the images with these keys; `embed` leaves them out from now on.

    Args:
        folder: The index.
        keys: As the source calls them.

    Returns:
        How many rows were hidden.

    Raises:
        UserError: A key is not in the index, or it cannot be written; nothing is hidden then.
    """
    with held(folder):
        store = Store(folder, check=False)
        found = _found(store, keys)
        hidden = set(store.ids[store.dead].tolist())
        ids = {id_ for own in found.values() for id_ in own} - hidden
        store.manifest.removed = sorted({*store.manifest.removed, *ids})
        store.manifest.save(folder)
    return len(ids)


def restore(folder: Path, keys: Sequence[str]) -> int:
    """Bring back what `remove` has hidden; what was compacted meanwhile comes back with the next `embed`.

    Args:
        folder: The index.
        keys: As the source calls them.

    Returns:
        How many rows were brought back, or will be.

    Raises:
        UserError: A key is not in the index, or it cannot be written.
    """
    with held(folder):
        store = Store(folder, check=False)
        manifest = store.manifest
        dropped = set(keys) & set(manifest.excluded)
        found = _found(store, [key for key in keys if key not in dropped])
        ids = {id_ for own in found.values() for id_ in own} & set(manifest.removed)
        manifest.removed = sorted(set(manifest.removed) - ids)
        manifest.excluded = [key for key in manifest.excluded if key not in dropped]
        manifest.save(folder)
    return len(ids) + len(dropped)


def compact(folder: Path) -> int:
    """Write the parts anew without hidden rows; ids stay.

    Args:
        folder: The index.

    Returns:
        Bytes that this has freed.

    Raises:
        UserError: It is damaged, faiss is needed and missing, or there is no room for the new parts beside the old.
    """
    with held(folder):
        store = Store(folder, check=True)
        manifest, before = store.manifest, _size(store.manifest)
        old = [part.file for part in manifest.parts]
        dropped = {store.row(at).key for at in np.flatnonzero(np.isin(store.ids, manifest.removed)).tolist()}
        parts: list[Part] = []
        for number, batch in enumerate(_live_batches(store), next_number(manifest)):
            parts.append(write_part(folder, number, batch))
        if manifest.approximate is not None:
            old.append(manifest.approximate.file)
            manifest.approximate = without_hidden(store, manifest.approximate)
        manifest.parts, manifest.removed, manifest.gone = parts, [], []
        manifest.excluded = sorted({*manifest.excluded, *dropped})
        manifest.save(folder)
        for name in old:
            remove_file(folder / name)
    return before - _size(manifest)


def make_approximate(folder: Path, encode: Callable[[list[str]], Tensor] | None = None) -> Approximate:
    """Make the approximate index, or bring it up to date, and measure its recall.

    Args:
        folder: The index.
        encode: Texts to (m, d) float32, so that recall is measured with texts as queries too; None leaves that.

    Raises:
        UserError: faiss is not installed, there are too few images, or it cannot be written.
    """
    with held(folder):
        return refresh_approximate(Store(folder, check=False), encode)


def refresh_approximate(store: Store, encode: Callable[[list[str]], Tensor] | None) -> Approximate:
    """As `make_approximate`, of an index that is held already; its manifest is saved."""
    old = store.manifest.approximate
    store.manifest.approximate = make(store, sample_queries(store, encode))
    store.manifest.save(store.folder)
    if old is not None:
        remove_file(store.folder / old.file)
    return store.manifest.approximate


def next_number(manifest: Manifest) -> int:
    """Of the next part."""
    return 1 + max((int(part.file[5:-6]) for part in manifest.parts), default=-1)


def _live_batches(store: Store) -> Iterator[pa.RecordBatch]:
    """The rows that are alive, `PART_ROWS` at a time."""
    pending: list[pa.RecordBatch] = []
    start = 0
    for part in store.parts:
        alive = ~store.dead[start : start + len(part)]
        start += len(part)
        pending.append(part.batch.filter(pa.array(alive)))
        while sum(map(len, pending)) >= PART_ROWS:
            whole = pa.concat_batches(pending)
            yield whole[:PART_ROWS]
            pending = [whole[PART_ROWS:]]
    if any(map(len, pending)):
        yield pa.concat_batches(pending)


def _found(store: Store, keys: Sequence[str]) -> dict[str, list[int]]:
    found = store.ids_of(keys)
    if missing := [key for key in keys if key not in found]:
        more = f", and {len(missing) - 1} more are not" if len(missing) > 1 else ""
        raise UserError(
            f"'{printable(missing[0])}' is not in the index '{store.folder}'{more}. Keys are what search shows: paths "
            "below the source, for most sources."
        )
    return found


def _size(manifest: Manifest) -> int:
    there = manifest.approximate
    return sum(part.bytes for part in manifest.parts) + (0 if there is None else there.bytes)
