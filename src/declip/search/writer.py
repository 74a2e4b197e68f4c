"""Writing an index: a new folder that appears, or replaces an older index, when it is complete."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from io import BufferedWriter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from declip.data.sources.names import resolve, stored_path
from declip.errors import UserError
from declip.io.atomic import HINT, atomic_write, flush
from declip.io.outputs import INDEX_FILE, check_folder
from declip.models.encoder import Encoder
from declip.models.fingerprint import fingerprint
from declip.search.info import IndexInfo, ModelInfo, Over, is_index
from declip.search.store import GROUP_ROWS, MATRICES, ROWS, SCHEMA, Block


class IndexWriter:
    """Writes the rows and vectors of an index one block after another."""

    def __init__(self, folder: Path, info: IndexInfo) -> None:
        self.folder = folder
        self.info = info
        # Without compression and dictionaries: see `_check_layout` of the store
        options = {"compression": "NONE", "use_dictionary": False}
        self._table = pq.ParquetWriter(folder / ROWS, SCHEMA, **options)
        self._matrices: dict[Over, BufferedWriter] = {}

    def add(self, block: Block) -> None:
        """Append rows and their vectors."""
        self._table.write_table(block.table, row_group_size=GROUP_ROWS)
        for over, values in block.matrices.items():
            self.info.dimension = values.shape[1]
            if over not in self._matrices:
                # Not a map of the file: a full disk would end the process
                self._matrices[over] = (self.folder / MATRICES[over]).open("wb")
                self._write_header(over)  # whose number of rows is not known yet
            self._matrices[over].write(np.ascontiguousarray(values).data)
        self.info.rows += len(block.table)

    def close(self) -> None:
        """Complete the files, index.json last."""
        self._table.close()
        for over, file in self._matrices.items():
            file.seek(0)
            self._write_header(over)  # NumPy's header has room for any number of rows
            file.close()
        for path in self.folder.iterdir():
            flush(path)
        self.info.save(self.folder)

    def _write_header(self, over: Over) -> None:
        header = {
            "descr": np.dtype(self.info.dtype).str,
            "fortran_order": False,
            "shape": (self.info.rows, self.info.dimension),
        }
        np.lib.format.write_array_header_1_0(self._matrices[over], header)


@contextmanager
def new_index(folder: Path, info: IndexInfo) -> Iterator[IndexWriter]:
    """Yield a writer; the index is in its folder when the block succeeds, and an older one until then."""
    with atomic_write(folder, HINT, durable=True) as partial:
        partial.mkdir()
        writer = IndexWriter(partial, info)
        yield writer
        writer.close()


def describe_model(model: Encoder, path: object, index: Path) -> ModelInfo:
    """Describe a model that was loaded from `path`, or is a Python object, for the index in a folder."""
    stored = stored_path(path, index)
    name = str(path)
    if not stored:
        name = model.class_name
        if model.recipe is not None:
            name = f"{name} {model.recipe.name}"
    return ModelInfo(path=stored, name=name, fingerprint=fingerprint(model))


def check_target(folder: Path, wanted: IndexInfo, overwrite: bool) -> None:
    """Raise a `UserError` unless an index may be written to a folder.

    A new or empty folder may be taken. An index of the same model, source and options is replaced,
    as embedding again updates it; any other index only with `overwrite`; other files never.
    """
    check_folder(folder, INDEX_FILE)
    if overwrite or not is_index(folder):
        return
    changed = _differences(folder, IndexInfo.read(folder), wanted)
    if changed:
        raise UserError(
            f"'{folder}' holds an index of another model or option: {'; '.join(changed)}. Choose "
            "another folder (--out of embed, --index of choose and app), or --overwrite."
        )


def _differences(folder: Path, before: IndexInfo, now: IndexInfo) -> list[str]:
    """Model, source and options of an index that differ from those of another."""
    changed = []
    if before.model.fingerprint != now.model.fingerprint:
        changed.append(f"the model was {before.model}, now {now.model}")
    one = _options(folder, before)
    other = _options(folder, now)
    for key, value in one.items():
        if value != other[key]:
            changed.append(f"{key} was {value!r}, now {other[key]!r}")
    return changed


def _options(folder: Path, info: IndexInfo) -> dict[str, object]:
    source = resolve(info.source.path, folder) or info.source.name
    columns = asdict(info.source.columns_of(folder))
    return {"the source": source, **columns, "dtype": info.dtype, "captions": info.captions}
