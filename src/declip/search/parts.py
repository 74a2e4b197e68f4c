"""Rows of an index in Arrow files that are mapped into memory: ids, keys, captions, places, vectors."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from declip.data.builtin.pictures import sha256
from declip.data.sources.origin import Origin
from declip.errors import UserError
from declip.io.atomic import atomic_write
from declip.search.manifest import ELSEWHERE, Manifest, Part

VECTOR, CAPTION_VECTOR = "vector", "caption_vector"
NUMBERS = {"float16": (pa.float16(), torch.float16), "float32": (pa.float32(), torch.float32)}

MOST_CAPTIONS, LONGEST_CAPTION = 16, 2_000
"""Captions of an image that are kept, and characters of one: what is shown, not what was learnt from."""


class Row(NamedTuple):
    """An image of an index.

    Attributes:
        id: Stays the same as long as the index lives.
        key: What the source calls it.
        captions: None or more.
        place: In the source, when it was embedded.
        origin: Where its file is.
    """

    id: int
    key: str
    captions: tuple[str, ...]
    place: int
    origin: Origin


def schema_of(manifest: Manifest) -> pa.Schema:
    """The columns of a part."""
    vector = pa.list_(NUMBERS[manifest.dtype][0], manifest.dimension)
    return pa.schema(
        [
            pa.field("id", pa.int64(), nullable=False),
            pa.field("place", pa.int64(), nullable=False),
            pa.field("key", pa.large_string(), nullable=False),
            pa.field("captions", pa.list_(pa.large_string()), nullable=False),
            pa.field("path", pa.large_string(), nullable=False),
            pa.field("offset", pa.int64(), nullable=False),
            pa.field("size", pa.int64(), nullable=False),
            pa.field("stamp", pa.large_string(), nullable=False),
            pa.field(VECTOR, vector, nullable=False),
            *([pa.field(CAPTION_VECTOR, vector, nullable=False)] if manifest.captions else []),
        ]
    )


def batch_of(manifest: Manifest, rows: Sequence[Row], vectors: Tensor, captions: Tensor | None) -> pa.RecordBatch:
    """Put rows together.

    Args:
        manifest: With the dimension, the dtype, and whether captions have vectors.
        rows: n rows.
        vectors: (n, d) float32, of length 1.
        captions: (n, d) float32; zeros for a row without captions; None where captions have no vectors.
    """
    schema = schema_of(manifest)
    origins = [row.origin for row in rows]
    columns = [
        [row.id for row in rows],
        [row.place for row in rows],
        [row.key for row in rows],
        [[text[:LONGEST_CAPTION] for text in row.captions[:MOST_CAPTIONS]] for row in rows],
        [origin.path for origin in origins],
        [origin.offset for origin in origins],
        [origin.size for origin in origins],
        [origin.stamp for origin in origins],
    ]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=False)]
    for tensor in (vectors, captions):
        if tensor is not None:
            numbers = pa.array(tensor.to(NUMBERS[manifest.dtype][1]).flatten().numpy())
            arrays.append(pa.FixedSizeListArray.from_arrays(numbers, manifest.dimension))
    return pa.record_batch(arrays, schema=schema)


def write_part(folder: Path, number: int, batch: pa.RecordBatch) -> Part:
    """Write rows to a file, which is on the disk when this returns.

    Raises:
        UserError: It cannot be written.
    """
    path = folder / f"part-{number:06d}.arrow"
    with atomic_write(path, ELSEWHERE, durable=True) as beside:
        with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        size, digest = beside.stat().st_size, sha256(beside)
    return Part(file=path.name, rows=len(batch), bytes=size, sha256=digest)


class OpenPart:
    """A part, mapped into memory; no file stays open.

    Args:
        folder: The index.
        manifest: Its manifest.
        part: Which.
        check: Whether its checksum is looked at; its size is in any case.

    Attributes:
        ids: (rows,) int64, rising.
        vectors: (rows, d) of the manifest's dtype.
        captions: (rows, d) likewise, or None.

    Raises:
        UserError: It is missing or damaged.
    """

    def __init__(self, folder: Path, manifest: Manifest, part: Part, check: bool) -> None:
        path = folder / part.file
        try:
            if path.stat().st_size != part.bytes:
                raise ValueError(f"{path.stat().st_size:,} bytes instead of {part.bytes:,}")
            self._mapped = torch.from_file(str(path), size=part.bytes, dtype=torch.uint8)
            if check and hashlib.sha256(self._mapped.numpy().data).hexdigest() != part.sha256:
                raise ValueError("its checksum differs")
            self.batch = pa.ipc.open_file(pa.py_buffer(self._mapped.numpy())).get_batch(0)
            self.batch.validate(full=True)
            if self.batch.schema != schema_of(manifest) or len(self.batch) != part.rows:
                raise ValueError("it holds other rows than the manifest says")
        except (OSError, RuntimeError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"The index's part '{path}' is damaged: {str(error).splitlines()[0]}. Bring back a copy, or embed "
                "again into another folder."
            ) from error
        self.ids: np.ndarray = self.batch.column("id").to_numpy()
        self.vectors = self._numbers(VECTOR, manifest)
        self.captions = self._numbers(CAPTION_VECTOR, manifest) if manifest.captions else None

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, number: int) -> Row:
        """A row by its number in this part."""
        found = {name: self.batch.column(name)[number].as_py() for name in self.batch.schema.names[:8]}
        origin = Origin(found["path"], found["offset"], found["size"], found["stamp"])
        return Row(found["id"], found["key"], tuple(found["captions"]), found["place"], origin)

    def _numbers(self, name: str, manifest: Manifest) -> Tensor:
        """A column of vectors as a tensor in the mapped memory."""
        values = self.batch.column(name).flatten()
        kind = NUMBERS[manifest.dtype][1]
        start = values.buffers()[1].address + values.offset * kind.itemsize - self._mapped.data_ptr()
        numbers = self._mapped[start : start + len(values) * kind.itemsize].view(kind)
        return numbers.view(len(self), manifest.dimension)
