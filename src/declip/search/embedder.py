"""Embed batches of rows in the processes of other programs, and make an index of the Parquet files that they write."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from declip.data.columns import DEFAULT, Columns
from declip.data.pair import BrokenPair, Origin, SkipCounter, printable
from declip.data.sources.names import absolute
from declip.data.sources.open import ImageSource, open_source
from declip.data.sources.python_items import ItemSource
from declip.data.sources.rows import ParquetRows, cell_name
from declip.errors import UserError
from declip.evaluation.encode import Encoder, image_features, read_images
from declip.interchange.read import load, loaded
from declip.io.text import one_line
from declip.models.dual_encoder import DualEncoder
from declip.models.fingerprint import fingerprint
from declip.models.inference import image_encoder
from declip.models.precision import TYPES, Precision, precision_of
from declip.search.info import Dtype, IndexInfo, ModelInfo, SourceInfo
from declip.search.store import (
    BLOCK_ROWS,
    Block,
    IndexedImage,
    describe_model,
    hash64,
    open_writer,
)

COLUMNS = ("id", "vector", "error", "model")
TOLERANCE = 1e-3  # of the length of a vector


def index_parquet(
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
    made_by = describe_model(loaded(model), model, folder)
    ids, precisions, skipped = _check(tables, made_by)
    source, rows = SourceInfo(path="", name=", ".join(map(str, given))), ids - skipped.total
    if not rows:
        raise UserError(f"'{source.name}' has no image that can be used: {skipped.explanation()}")
    # --- their vectors
    blocks = _blocks(tables, dtype)
    first = next(blocks)
    with open_writer(folder, IndexInfo(model=made_by, source=source, dtype=dtype, captions=False)) as writer:
        writer.info.dimension, writer.info.next_id = first.matrices["images"].shape[1], rows
        writer.info.precision = ", ".join(sorted(filter(None, precisions)))
        writer.replace(chain([first], blocks), rows, skipped)


def _read(table: ParquetRows, *names: str) -> Iterator[list[Any]]:
    """Read columns of a table, some rows at a time."""
    try:
        for batch in table.read(names)[1]:
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
                precisions |= {precision} if precision in TYPES else set()
                if digest != made_by.fingerprint:
                    raise UserError(
                        f"The vectors in '{table.path}' were made by another model, of fingerprint "
                        f"{printable(digest[:8])}, not by {made_by}. Give that model, or embed again."
                    )
    counts = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]), return_counts=True)[1]
    if repeated := int((counts > 1).sum()):
        raise UserError(f"{repeated:,} ids are in several rows each. Remove files that were written twice.")
    return int(counts.sum()), precisions, skipped


def _blocks(tables: Sequence[ParquetRows], dtype: str) -> Iterator[Block]:
    """The rows without an error."""
    rows, held, total, width = list[IndexedImage](), list[np.ndarray](), 0, 0
    for table in tables:
        for ids, vectors, errors in _read(table, "id", "vector", "error"):
            usable = [not error for error in errors.to_pylist()]
            if not any(usable):
                continue
            values = _vectors(vectors.filter(pa.array(usable, pa.bool_())), width, table.path)  # (n, d)
            width = values.shape[1]
            keys = compress(map(cell_name, ids.to_pylist()), usable)
            rows += [IndexedImage(number, key, (), number, Origin()) for number, key in enumerate(keys, total)]
            held.append(values)
            total += len(values)
            if len(rows) >= BLOCK_ROWS:
                yield Block.of(rows, torch.from_numpy(np.concatenate(held)), None, dtype)
                rows, held = [], []
    if rows:
        yield Block.of(rows, torch.from_numpy(np.concatenate(held)), None, dtype)


def _vectors(cells: pa.Array, width: int, path: Path) -> np.ndarray:
    """(n, d) float32 of a column of lists; `width` is d if it is known."""
    cells = cells.storage if isinstance(cells, pa.ExtensionArray) else cells  # Ray's tensors
    try:
        lengths = {*pc.list_value_length(cells).to_pylist(), *([width] if width else [])}
        values = np.from_dlpack(pc.list_flatten(cells).cast(pa.float32())).reshape(len(cells), -1)
        if len(lengths) == 1 and (np.abs(np.linalg.norm(values, axis=1) - 1) <= TOLERANCE).all():  # false for NaN
            return values
        problem = f"have {' or '.join(map(str, lengths))} numbers, or are not of length 1"
    except (pa.ArrowException, BufferError, ValueError) as error:
        problem = f"cannot be read: {one_line(error)}"
    raise UserError(f"The vectors in '{path}' {problem}. They must be as `declip.Embedder` returns them.")


class Embedder:
    """Embed batches of rows: the function that Ray Data, datasets, Daft and Spark call in their workers.

    It is pickled without weights: each process loads the model once. The vectors are those of `declip.embed`.

    Args:
        model: What `declip.load` opens, by a path or name that every worker can read.
        image: Column of images: PIL images, arrays (H, W, 3) uint8, paths, bytes, or dicts of `bytes` and `path`.
        id: Column that identifies a row; it is copied.
        source: A source of `declip.embed` to read the images from, such as tar shards, opened in each process. `id` is
            then the column of their numbers, and becomes their key.
        columns: Columns of the source, if it is a table.
        precision: As in `declip.load`.

    Examples:
        >>> embed = declip.Embedder("runs/demo", image="photo", id="name")
        >>> sorted(embed({"name": ["red"], "photo": ["photos/red.png"]}))
        ['error', 'id', 'model', 'vector']
    """

    def __init__(
        self,
        model: str | Path,
        *,
        image: str = "image",
        id: str = "id",
        source: str | Path | None = None,
        columns: Columns = DEFAULT,
        device: str = "auto",
        precision: Precision = "auto",
    ) -> None:
        # Workers may have another working directory.
        self.model, self.source, self.columns = absolute(model), source and absolute(source), columns
        self.image, self.id = image, id
        self.device, self.precision = device, precision

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Embed the rows of a batch, whose columns are lists or arrays.

        Returns:
            For each row: `id`; `vector`, (n, d) float32 of length 1, or zeros if the row is broken; `error`, the
            reason, else empty; `model`, its fingerprint and precision, which `Index.from_parquet` checks.
        """
        model, encode, made_by = _load(self.model, self.device, self.precision)
        ids = _column(batch, self.id, "id")
        indices: Sequence[int] = range(len(ids))
        if self.source is None:
            items: list[Any] = [(image, None) for image in _column(batch, self.image, "image")]
            source = ImageSource(ItemSource(items or [None]), captioned=False)
        else:
            indices, source = ids, _open(self.source, self.columns)
            if unknown := [index for index in indices if not 0 <= index < len(source)]:
                raise UserError(
                    f"There is no image {unknown[0]} in '{source.name}': it has {len(source):,}, from 0 on."
                )
            ids = [source.key(index) for index in indices]
        # --- why each image cannot be used, and the pixels (1, 3, S, S) of those that can
        errors, usable = list[str](), list[Tensor]()
        for index in indices:  # each alone, to know what is wrong with it
            pixels, _, broken = read_images(model.preprocessor, lambda at: (source.read_lazy(at).image, 0), [index])
            errors.append("; ".join(f"{reason}: {detail}" for reason, detail in broken.details.items()))
            usable += [] if pixels is None else [pixels]
        # --- an array without gaps: of lists with None, Ray makes pickled objects
        rows = np.zeros((len(ids), model.recipe.embed_dim), np.float32)
        if usable:
            rows[[not error for error in errors]] = image_features(model, torch.cat(usable), encode).numpy()
        return {"id": ids, "vector": rows, "error": errors, "model": [made_by] * len(ids)}


@lru_cache(1)
def _load(where: str, device: str, precision: Precision) -> tuple[DualEncoder, Callable[[Tensor], Tensor], str]:
    """The model of this process, the function that encodes many images, and what identifies both."""
    model = load(where, device, precision)
    return model, image_encoder(model), f"{fingerprint(model)} {precision_of(model)}"


def _column(batch: Mapping[str, Any], name: str, argument: str) -> list[Any]:
    if name not in batch:
        columns = ", ".join(map(str, batch))
        raise UserError(f"The batch has no column '{name}' but {columns}. Name one of them: Embedder(…, {argument}=…).")
    return list(batch[name])


@lru_cache(1)
def _open(source: str, columns: Columns) -> ImageSource:
    return ImageSource(open_source(source, columns), captioned=False)
