"""Make an index of the Parquet files that other programs write with `declip.Embedder`."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from declip.data.pair import BrokenPair, Origin, SkipCounter, printable
from declip.data.sources.rows import ParquetRows, cell_name
from declip.errors import UserError
from declip.interchange.read import loaded
from declip.io.text import one_line
from declip.models.encoder import Encoder
from declip.models.precision import TYPES
from declip.search.embedder import COLUMNS
from declip.search.info import Dtype, IndexInfo, ModelInfo, SourceInfo
from declip.search.store import Block, IndexedImage
from declip.search.writer import check_target, describe_model, new_index

TOLERANCE = 1e-3  # of the length of a vector


def index_parquet(
    files: str | Path | Iterable[str | Path],
    model: str | Path | Encoder,
    folder: Path,
    dtype: Dtype,
    overwrite: bool,
) -> None:
    """See `Index.from_parquet`."""
    given = [files] if isinstance(files, str | Path) else list(files)
    tables = [ParquetRows(Path(file)) for file in given]
    for table in tables:
        absent = [name for name in COLUMNS if name not in table.columns]
        if absent:
            raise UserError(
                f"'{table.path}' has no column '{absent[0]}'; `declip.Embedder` returns {', '.join(COLUMNS)}."
            )
    made_by = describe_model(loaded(model), model, folder)
    precisions, skipped = _check(tables, made_by)
    source = SourceInfo(path="", name=", ".join(map(str, given)))
    info = IndexInfo(
        model=made_by,
        source=source,
        dtype=dtype,
        captions=False,
        precision=", ".join(sorted(precisions)),
        skipped=skipped.to_dict(),
    )
    check_target(folder, info, overwrite)
    with new_index(folder, info) as writer:
        for block in _blocks(tables, dtype):
            writer.add(block)
        if not info.rows:
            raise UserError(
                f"'{source.name}' has no image that can be used: {skipped.explanation()}"
            )


def _read(table: ParquetRows, *names: str) -> Iterator[list[Any]]:
    """Read columns of a table, some rows at a time."""
    try:
        for batch in table.read(names)[1]:
            yield batch.columns
    except (OSError, pa.ArrowException) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"'{table.path}' cannot be read: {problem}. Write it again.") from error


def _check(tables: Sequence[ParquetRows], made_by: ModelInfo) -> tuple[set[str], SkipCounter]:
    """Check ids and models; returns the precisions of the vectors, and broken rows by reason."""
    seen = set[int]()
    repeated = set[int]()
    precisions = set[str]()
    skipped = SkipCounter()
    for table in tables:
        for ids, errors, models in _read(table, "id", "error", "model"):
            for id, error in zip(ids.to_pylist(), errors.to_pylist(), strict=True):
                key = cell_name(id)
                number = hash(key)  # 8 bytes, however long the key is
                if number in seen:
                    repeated.add(number)
                seen.add(number)
                if error:
                    reason, _, detail = str(error).partition(": ")
                    skipped.add(BrokenPair(reason, key, detail))
            for model in models.unique().to_pylist():
                digest, _, precision = str(model).partition(" ")
                if digest != made_by.fingerprint:
                    raise UserError(
                        f"The vectors in '{table.path}' were made by another model, of fingerprint "
                        f"{printable(digest[:8])}, not by {made_by}. Give that model, or embed "
                        "again."
                    )
                if precision in TYPES:
                    precisions.add(precision)
    if repeated:
        raise UserError(
            f"{len(repeated):,} ids are in several rows each. Remove files that were written twice."
        )
    return precisions, skipped


def _blocks(tables: Sequence[ParquetRows], dtype: str) -> Iterator[Block]:
    """The rows without an error, with their vectors."""
    count = 0
    width = 0
    for table in tables:
        for ids, cells, errors in _read(table, "id", "vector", "error"):
            usable = pa.array([not error for error in errors.to_pylist()], pa.bool_())
            keys = [cell_name(id) for id in ids.filter(usable).to_pylist()]
            if not keys:
                continue
            vectors = _vectors(cells.filter(usable), width, table.path)
            width = vectors.shape[1]
            rows = []
            for number, key in enumerate(keys, count):
                rows.append(IndexedImage(number, key, (), number, Origin()))
            yield Block.of(rows, torch.from_numpy(vectors), None, dtype)
            count += len(keys)


def _vectors(cells: pa.Array, width: int, path: Path) -> np.ndarray:
    """(n, d) float32 of a column of lists; `width` is d if it is known."""
    if isinstance(cells, pa.ExtensionArray):  # Ray's tensors
        cells = cells.storage
    try:
        lengths = {*pc.list_value_length(cells).to_pylist()}
        if width:
            lengths.add(width)
        flat = np.from_dlpack(pc.list_flatten(cells).cast(pa.float32()))
        values = flat.reshape(len(cells), -1).copy()  # torch asks for a writable array
        errors = np.abs(np.linalg.norm(values, axis=1) - 1)
        if len(lengths) == 1 and (errors <= TOLERANCE).all():  # false for NaN
            return values
        counts = " or ".join(map(str, lengths))
        problem = f"have {counts} numbers, or are not of length 1"
    except (pa.ArrowException, BufferError, ValueError) as error:
        problem = f"cannot be read: {one_line(error)}"
    raise UserError(
        f"The vectors in '{path}' {problem}. They must be as `declip.Embedder` returns them."
    )
