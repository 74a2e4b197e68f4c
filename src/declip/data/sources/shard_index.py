"""The index of a tar shard: the place of each pair's image and captions, built once and memory-mapped."""

import re
import tarfile
from collections.abc import Mapping

import pyarrow as pa

from declip.data.images.decode import EXTENSIONS
from declip.data.sources.open_file import OpenFile
from declip.data.sources.tar_members import members
from declip.errors import UserError

PARTS = ("image", "text", "json")
KINDS = {ending.removeprefix("."): "image" for ending in EXTENSIONS} | {"txt": "text", "json": "json"}
"""The part that a file is, by its extension."""

SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^./]*)", re.DOTALL)
"""A key and its extension; as in WebDataset the key ends at the first dot of the name's last part."""

Places = Mapping[str, tuple[int, int]]
"""Start and size in bytes of the parts that a pair has."""

SCHEMA = pa.schema([("key", pa.large_binary()), *((part, pa.list_(pa.int64(), 2)) for part in PARTS)])


def read_entry(index: pa.Table, row: int) -> tuple[str, Places]:
    """A pair's key, whose bytes that are not UTF-8 are escaped, and its parts."""
    places = {part: index[part][row].as_py() for part in PARTS}
    key = index["key"][row].as_py().decode(errors="backslashreplace")
    return key, {part: tuple(place) for part, place in places.items() if place is not None}


def make_index(file: OpenFile, name: str) -> pa.RecordBatch:
    """Find the pairs of a shard, in the order in which it first names them; raises `UserError` for a damaged one.

    Members of one key are a pair wherever they stand, with the first of several images. A second image of the same
    extension, text or JSON of a key begins another pair.
    """
    rows: list[dict[str, object]] = []
    latest: dict[str, dict[str, object]] = {}
    images: dict[str, str] = {}  # the extension of the latest pair's image by key
    try:
        for member, at, size in members(file):
            match = SAMPLE.fullmatch(member)
            key, ending = (match[1], match[2].lower()) if match else ("", "")
            if ending not in KINDS:
                continue
            part = KINDS[ending]
            if part == "image" and images.setdefault(key, ending) != ending:
                continue
            if key not in latest or part in latest[key]:
                latest[key] = {"key": key.encode(errors="surrogateescape")}
                rows.append(latest[key])
            latest[key][part] = (at, size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(
            f"The shard '{name}' is no tar archive that can be read beyond its first {len(rows):,} pairs: {error}. "
            "Fetch or write it anew, or leave it out; one that is compressed has to be unpacked once."
        ) from error
    return pa.RecordBatch.from_pylist(rows, SCHEMA)
