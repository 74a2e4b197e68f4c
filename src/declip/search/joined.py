"""Indices of what several processes embedded: parts of `embed`, and Parquet files that `Embedder` returned."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from declip.data.pair import BrokenPair, Origin, SkipCounter, printable
from declip.data.sources.rows import ParquetRows, cell_name
from declip.errors import UserError
from declip.evaluation.encode import Encoder
from declip.interchange.read import load
from declip.io.parts import find_parts
from declip.models.inference import OPENVINO, TYPES
from declip.search.info import INFO, Dtype, IndexInfo, ModelInfo, SourceInfo
from declip.search.store import PART_ROWS, Block, IndexedImage, hash64
from declip.search.writer import check_same, describe_model, open_index, open_writer

COLUMNS = ("id", "vector", "error", "model")
TOLERANCE = 1e-3  # of the length of a vector


def join_parts(folder: Path) -> None:
    """See `Index.join`."""
    # --- all parts, of one model and one source
    opened = [open_index(path) for path in find_parts(folder, INFO)]
    infos, stores = [info for info, _ in opened], [store for _, store in opened]
    first, skipped = infos[0], SkipCounter()
    for path, info in zip((store.folder.parent for store in stores), infos, strict=True):
        check_same(path, first, info)
        if info.part is None or first.part is None or info.part.images != first.part.images:
            raise UserError(f"'{path}' and the first part are of another number of images. Embed all parts again.")
        skipped.merge(SkipCounter.from_dict(info.skipped))
    if (folder / INFO).is_file() and IndexInfo.read(folder).part is None:
        raise UserError(f"'{folder}' was made or updated without parts. Remove it, or embed parts of another --out.")

    # --- their rows, numbered from 0 on
    def blocks() -> Iterator[Block]:
        start = 0
        for store in stores:
            for block in store.blocks(np.ones(len(store.ids), bool)):
                ids = pa.array(np.arange(start, start + len(block.table)))
                start += len(ids)
                yield Block(block.table.set_column(0, block.table.schema.field("id"), ids), block.matrices)

    made = first.part.model_copy(update={"number": 0})  # type: ignore[union-attr]
    wanted = first.model_copy(update={"part": made, "generation": 0})
    _write(folder, wanted, {info.precision for info in infos}, blocks(), sum(info.rows for info in infos), skipped)


def join_parquet(
    files: str | Path | Iterable[str | Path], model: str | Path | Encoder, folder: Path, dtype: Dtype
) -> None:
    """See `Index.from_parquet`."""
    # --- what is in the files, except the vectors
    given = [files] if isinstance(files, str | Path) else list(files)
    tables = [ParquetRows(Path(file)) for file in given]
    for table in tables:
        if absent := [name for name in COLUMNS if name not in table.columns]:
            raise UserError(
                f"'{table.path}' has no column '{absent[0]}'; `declip.Embedder` returns {', '.join(COLUMNS)}."
            )
    encoder = load(model) if isinstance(model, str | Path) else model
    made_by = describe_model(encoder, model, folder)
    ids, precisions, skipped = _check(tables, made_by)
    # --- their vectors
    source = SourceInfo(path="", name=", ".join(map(str, given)))
    wanted = IndexInfo(model=made_by, source=source, dtype=dtype, captions=False)
    _write(folder, wanted, precisions, _blocks(tables, dtype), ids - skipped.total, skipped)


def _write(
    folder: Path, wanted: IndexInfo, precisions: set[str], blocks: Iterator[Block], rows: int, skipped: SkipCounter
) -> None:
    """Write an index of blocks, or replace one of the same model, source and options."""
    if not rows:
        raise UserError(f"'{wanted.source.name}' has no image that can be used: {skipped.explanation()}")
    first = next(blocks)
    with open_writer(folder, wanted) as writer:
        writer.info.dimension, writer.info.next_id = first.matrices["images"].shape[1], rows
        writer.info.precision = ", ".join(sorted(filter(None, precisions)))
        writer.replace(chain([first], blocks), rows, skipped)


def _read(table: ParquetRows, *names: str) -> Iterator[list[Any]]:
    """Read columns of a table, some rows at a time."""
    try:
        for batch in table.read(names, None)[1]:
            yield batch.columns
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"'{table.path}' cannot be read: {str(error).splitlines()[0]}. Write it again.") from error


def _check(tables: Sequence[ParquetRows], made_by: ModelInfo) -> tuple[int, set[str], SkipCounter]:
    """Check ids and models; returns the number of rows, the precisions of the vectors, and broken rows by reason."""
    hashes, precisions, skipped = list[np.ndarray](), set[str](), SkipCounter()
    for table in tables:
        for ids, errors, models in _read(table, "id", "error", "model"):
            keys = list(map(cell_name, ids.to_pylist()))
            hashes.append(np.array(list(map(hash64, keys)), np.uint64))  # 8 bytes a row, whatever its id
            for key, error in zip(keys, errors.to_pylist(), strict=True):
                if error:
                    reason, _, detail = str(error).partition(": ")
                    skipped.add(BrokenPair(reason, key, detail))
            for digest, _, precision in (str(model).partition(" ") for model in models.unique().to_pylist()):
                precisions |= {precision} if precision.removeprefix(OPENVINO) in TYPES else set()
                if digest != made_by.fingerprint:
                    raise UserError(
                        f"The vectors in '{table.path}' were made by another model, of fingerprint "
                        f"{printable(digest[:8])}, not by {made_by}. Give that model, or embed again."
                    )
    distinct, counts = np.unique(np.concatenate(hashes), return_counts=True) if hashes else np.zeros((2, 0))
    for repeated in distinct[counts > 1][:1]:
        every = (key for table in tables for (ids,) in _read(table, "id") for key in map(cell_name, ids.to_pylist()))
        key = next(key for key in every if hash64(key) == repeated)
        raise UserError(f"The id '{printable(key)}' is in several rows. Remove files that were written twice.")
    return int(counts.sum()), precisions, skipped


def _blocks(tables: Sequence[ParquetRows], dtype: str) -> Iterator[Block]:
    """The rows without an error."""
    rows, parts, total, width = list[IndexedImage](), list[np.ndarray](), 0, 0
    for table in tables:
        for ids, vectors, errors in _read(table, "id", "vector", "error"):
            usable = [not error for error in errors.to_pylist()]
            values = _vectors(vectors.filter(pa.array(usable, pa.bool_())), width, table.path)  # (n, d)
            width = values.shape[1]
            keys = compress(map(cell_name, ids.to_pylist()), usable)
            rows += [IndexedImage(number, key, (), number, Origin()) for number, key in enumerate(keys, total)]
            parts.append(values)
            total += len(values)
            if len(rows) >= PART_ROWS:
                yield Block.of(rows, torch.from_numpy(np.concatenate(parts)), None, dtype)
                rows, parts = [], []
    if rows:
        yield Block.of(rows, torch.from_numpy(np.concatenate(parts)), None, dtype)


def _vectors(cells: pa.Array, width: int, path: Path) -> np.ndarray:
    """(n, d) float32 of a column of lists; `width` is d if it is known."""
    cells = cells.storage if isinstance(cells, pa.ExtensionArray) else cells  # Ray's tensors
    if not len(cells):
        return np.zeros((0, width), np.float32)
    problem = f"are of the type {cells.type}"
    if isinstance(cells, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        lengths = {*pc.list_value_length(cells).to_pylist(), width or pc.list_value_length(cells)[0].as_py()}
        flat, problem = cells.flatten(), f"have {' and '.join(map(str, lengths))} numbers"
        if len(lengths) == 1 and None not in lengths and not flat.null_count:
            values = np.from_dlpack(flat.cast(pa.float32())).reshape(len(cells), -1)
            norms = np.linalg.norm(values, axis=1)
            if (np.abs(norms - 1) <= TOLERANCE).all():  # false for NaN
                return values
            problem = "are not of length 1"
    raise UserError(f"The vectors in '{path}' {problem}. They must be as `declip.Embedder` returns them.")
