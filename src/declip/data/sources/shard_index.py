"""The index of a tar shard: the place of each pair's image and captions, built once and memory-mapped."""

import re
from array import array

import numpy as np
import pyarrow as pa

from declip.data.images.decode import EXTENSIONS
from declip.data.sources.tar_members import DamagedTar, members
from declip.errors import UserError
from declip.io.open_file import OpenFile

PARTS = ("image", "text", "json")
KINDS = {ending.removeprefix("."): 0 for ending in EXTENSIONS} | {"txt": 1, "json": 2}
"""Index into `PARTS` by extension."""

SAMPLE = re.compile(rb"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
"""A key and its extension, split as WebDataset does: at the first dot of the name's last part."""

RANKS = {ending: rank for rank, ending in enumerate(dict.fromkeys(("jpg", "png", "jpeg", "webp", *KINDS)))}
"""Of several images of a key the first in this order is read, as open_clip prefers them."""

MISSING = -1
DAMAGE = b"damage"
"""Metadata key of the fault of a damaged shard, whose index ends with a row for the pairs that are lost."""


class ShardIndex:
    """The pairs of a shard, in the order in which the shard first names them; `damage` is its fault, if any."""

    def __init__(self, table: pa.Table) -> None:
        self._keys = table["key"].chunk(0)
        self._places = table["places"].chunk(0).flatten().to_numpy().reshape(-1, len(PARTS), 2)
        damage = (table.schema.metadata or {}).get(DAMAGE)
        self.damage: str | None = None if damage is None else damage.decode()

    def __len__(self) -> int:
        return len(self._keys)

    def key(self, row: int) -> str:
        """The pair's key; bytes that are not UTF-8 are escaped."""
        return self._keys[row].as_py().decode(errors="backslashreplace")

    def part(self, row: int, name: str) -> tuple[int, int] | None:
        """Start and size in bytes of the "image", "text" or "json" of a pair; None where it is missing."""
        at, size = self._places[row, PARTS.index(name)].tolist()
        return None if at == MISSING else (at, size)


def make_index(file: OpenFile, name: str) -> pa.RecordBatch:
    """Find the pairs of a shard: a row for each, `MISSING` where a part is, and one more for a damaged shard.

    Members of one key are a pair wherever they stand. A second image of the same extension, text or JSON of a key
    begins another pair. A name such as "IMG_1.2.jpg", whose key would be "IMG_1" and its extension "2.jpg", is a row
    without any part, so that it is counted.
    """
    keys: list[bytes] = []
    places = array("q")  # for each pair, start and size of each of `PARTS`
    ranks: dict[int, int] = {}
    latest: dict[bytes, int] = {}
    dotted: dict[tuple[bytes, bytes], set[int]] = {}

    def add(key: bytes) -> int:
        latest[key] = len(keys)
        keys.append(key)
        places.extend([MISSING] * 2 * len(PARTS))
        return latest[key]

    damage = None
    try:
        for name_in_tar, at, size in members(file):
            match = SAMPLE.fullmatch(name_in_tar)
            if match is None:
                continue
            key = match[1]
            dots, _, ending = match[2].decode(errors="replace").lower().rpartition(".")
            kind = KINDS.get(ending)
            if kind is None:
                continue
            if dots:
                dotted.setdefault((key, name_in_tar.rpartition(b".")[0]), set()).add(kind)
                continue
            row, rank = latest.get(key), RANKS[ending]
            taken = row is not None and places[2 * (len(PARTS) * row + kind)] != MISSING
            if row is not None and taken and kind == 0 and rank != ranks[row]:
                if rank > ranks[row]:
                    continue
            elif row is None or taken:
                row = add(key)
            if kind == 0:
                ranks[row] = rank
            place = 2 * (len(PARTS) * row + kind)
            places[place], places[place + 1] = at, min(size, 1 << 62)
    except DamagedTar as error:
        damage = str(error)
    except OSError as error:
        raise UserError(f"The shard '{name}' cannot be read: {error.strerror}.") from error
    for (key, stem), kinds in dotted.items():
        # An image without a caption next to a pair's image, such as "1.seg.png", belongs to that pair.
        if 0 in kinds and (len(kinds) > 1 or key not in latest):
            add(stem)
    if damage is not None:
        if not keys:
            raise UserError(
                f"The shard '{name}' is no tar archive that can be read: {damage}. If it is compressed, unpack it once "
                "(images are compressed already), else fetch or write it anew."
            )
        add(b"")
    columns = [
        pa.array(keys, pa.large_binary()),
        pa.FixedSizeListArray.from_arrays(pa.array(np.frombuffer(places, np.int64)), 2 * len(PARTS)),
    ]
    return pa.record_batch(columns, ["key", "places"], metadata={} if damage is None else {DAMAGE: damage})
