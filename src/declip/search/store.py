"""The files of an index: a Parquet table and .npy matrices, in a new folder after each change."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from io import BufferedWriter
from itertools import pairwise
from pathlib import Path
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from declip.data.pair import Origin, SkipCounter
from declip.data.sources.names import resolve, stored_path
from declip.errors import UserError, unknown
from declip.evaluation.encode import Encoder
from declip.io.atomic import ELSEWHERE, atomic_write, flush, locked_folder, remove
from declip.io.text import one_line
from declip.models.fingerprint import fingerprint
from declip.search.info import INFO, IndexInfo, ModelInfo, Over

ROWS = "rows.parquet"
UNFINISHED = ".unfinished"  # folder of the blocks that a call has embedded, with an index.json for `check_same`
MATRICES: dict[Over, str] = {"images": "vectors.npy", "captions": "caption_vectors.npy"}

BLOCK_ROWS = 8_192  # most rows of a block of an unfinished index, and of a row group
MOST_CAPTIONS, LONGEST_CAPTION = 16, 2_000  # captions of an image that are stored to be shown, and characters of one
CACHED_GROUPS = 8  # row groups that stay decoded, about 2 MB each

_COLUMNS = {
    "id": pa.int64(),
    "place": pa.int64(),
    "key": pa.large_string(),
    "captions": pa.list_(pa.field("element", pa.large_string(), nullable=False)),
    "path": pa.large_string(),
    "offset": pa.int64(),
    "size": pa.int64(),
    "stamp": pa.large_string(),
}
SCHEMA = pa.schema([pa.field(name, kind, nullable=False) for name, kind in _COLUMNS.items()])


@dataclass(frozen=True)
class IndexedImage:
    """A row of an index."""

    id: int  # for `Index.image` and `Index.vectors`; stays the same in later updates
    key: str  # the source's name of the image
    captions: tuple[str, ...]
    place: int  # index of the image in the source, as of the last update
    origin: Origin  # its file or shard, with offset and size in bytes

    @property
    def caption(self) -> str:
        """The first caption; empty if there is none."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True)
class Block:
    """Rows in memory with their vectors."""

    table: pa.Table  # with the columns of `SCHEMA`
    matrices: dict[Over, np.ndarray]  # (n, d) each; rows of zeros in "captions" are images without captions

    @classmethod
    def of(cls, rows: Sequence[IndexedImage], images: Tensor, captions: Tensor | None, dtype: str) -> "Block":
        """Convert rows and their vectors (n, d) float32 to the types that are stored."""
        texts = [[text[:LONGEST_CAPTION] for text in row.captions[:MOST_CAPTIONS]] for row in rows]
        cells = [(row.id, row.place, row.key, shown, *row.origin) for row, shown in zip(rows, texts, strict=True)]
        columns = list(zip(*cells, strict=True))
        arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
        given = zip(MATRICES, (images, captions), strict=True)
        matrices = {over: vectors.numpy().astype(dtype) for over, vectors in given if vectors is not None}
        return cls(pa.table(arrays, schema=SCHEMA), matrices)


def hash64(value: object) -> int:
    """64 bits that stand for a key, or for a key with a stamp."""
    return int.from_bytes(hashlib.blake2b(repr(value).encode("utf-8", "replace"), digest_size=8).digest(), "little")


def write_blocks(target: Path, blocks: Iterable[Block], count: int) -> None:
    """Write `count` rows into the new folder `target`, which appears when all of its files are on the disk."""
    with atomic_write(target, ELSEWHERE, durable=True) as folder:
        folder.mkdir()
        files: dict[Over, BufferedWriter] = {}
        # Without compression and dictionaries, so that a file's size limits what reading it takes: `_check_layout`.
        table = pq.ParquetWriter(folder / ROWS, SCHEMA, compression="NONE", use_dictionary=False)
        with ExitStack() as opened, table as writer:
            for block in blocks:
                writer.write_table(block.table, row_group_size=BLOCK_ROWS)
                for over, values in block.matrices.items():
                    if over not in files:  # not a map of the file: a full disk would end the process
                        files[over] = opened.enter_context((folder / MATRICES[over]).open("wb"))
                        kind = {"descr": values.dtype.str, "fortran_order": False, "shape": (count, values.shape[1])}
                        np.lib.format.write_array_header_1_0(files[over], kind)
                    files[over].write(np.ascontiguousarray(values).data)
        for path in folder.iterdir():
            flush(path)


class Store:
    """The rows and vectors in a folder of `write_blocks`. Damage is a `UserError`, a missing file FileNotFoundError."""

    # Only the ids are read here. The vectors stay mapped from the disk, and rows are decoded by groups.
    def __init__(self, folder: Path, index: Path, info: IndexInfo) -> None:
        self.folder, self.index, self._lock = folder, index, Lock()
        self.matrices: dict[Over, np.ndarray] = {}
        with self._reading():
            self.sizes = {path: path.stat().st_size for path in sorted(folder.iterdir())}
            self._file = pq.ParquetFile(folder / ROWS, memory_map=True)
            sizes = _check_layout(self._file)
            for over, name in MATRICES.items():
                if over == "captions" and not info.captions:
                    continue
                # Mode "c" (copy on write) because torch warns about arrays that are not writable.
                matrix = self.matrices[over] = np.load(folder / name, mmap_mode="c")
                if (matrix.shape, matrix.dtype) != ((sum(sizes), info.dimension), np.dtype(info.dtype)):
                    raise ValueError(f"{name} has shape {matrix.shape} and type {matrix.dtype}")
        self.ids = self.numbers("id")
        with self._reading():
            if (np.diff(self.ids) <= 0).any() or (self.ids >= info.next_id).any():
                raise ValueError("the ids do not increase")
        self._starts = np.cumsum([0, *sizes])

    def column(self, name: str) -> pa.ChunkedArray:
        """Read a column of all rows."""
        with self._reading():
            column = self._file.read([name], use_threads=False)[name]
            column.validate(full=True)
            return column

    def numbers(self, name: str) -> np.ndarray:
        """Read a column of integers of all rows, (n,) int64."""
        # Not `to_numpy`, which imports pandas; `concatenate` makes the writable copy that torch asks for.
        return np.concatenate([np.zeros(0, np.int64), *map(np.from_dlpack, self.column(name).chunks)])

    def tables(self, *names: str) -> Iterator[pa.Table]:
        """Read columns of all rows, group by group."""
        return (self._read_group(number, *names) for number in range(len(self._starts) - 1))

    def positions(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """(n,) int64, the positions of rows; raises `UserError` for an id that does not exist."""
        wanted = np.atleast_1d(np.asarray(ids, np.int64))
        positions = np.searchsorted(self.ids, wanted)
        known = np.append(self.ids, -1)[positions] == wanted
        if not known.all():
            raise UserError(f"The index '{self.index}' has no image with the id {wanted[~known][0]}.")
        return positions

    def rows(self, positions: np.ndarray) -> list[IndexedImage]:
        """Read the rows at positions; each group of rows is decoded once."""
        numbers = np.searchsorted(self._starts, positions, "right") - 1
        rows = dict[int, IndexedImage]()
        for number in np.unique(numbers).tolist():
            columns = self._group(number).columns
            for at in np.flatnonzero(numbers == number).tolist():
                cells = (column[int(positions[at] - self._starts[number])].as_py() for column in columns)
                id, place, key, captions, path, *rest = cells
                rows[at] = IndexedImage(id, key, tuple(captions), place, Origin(resolve(path, self.index), *rest))
        return [rows[at] for at in range(len(positions))]

    def matrix(self, over: Over = "images") -> np.ndarray:
        """(n, d), all vectors of a kind, mapped from the disk."""
        if over not in MATRICES:
            raise unknown("kind of vectors", over, MATRICES)
        if over not in self.matrices:
            raise UserError(f"The index '{self.index}' has no vectors of captions. Embed again with --captions.")
        return self.matrices[over]

    def blocks(self, positions: np.ndarray) -> Iterator[Block]:
        """The rows whose new `positions` (n,) in the source are not negative, with them, group by group."""
        for number, (start, stop) in enumerate(pairwise(self._starts)):
            own = positions[start:stop]
            if (kept := own >= 0).any():
                table = self._read_group(number).filter(pa.array(kept))
                table = table.set_column(1, SCHEMA.field("place"), pa.array(own[kept]))
                yield Block(table, {over: matrix[start:stop][kept] for over, matrix in self.matrices.items()})

    @cached_property
    def _group(self) -> Callable[[int], pa.Table]:
        # Made at its first use: it refers to this object, whose files would stay open until Python looks for cycles.
        return lru_cache(CACHED_GROUPS)(self._read_group)

    def _read_group(self, number: int, *names: str) -> pa.Table:
        with self._reading():
            table = self._file.read_row_group(number, names or None, use_threads=False)
            table.validate(full=True)
            return table

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One thread at a time, with damage as a `UserError`."""
        try:
            with self._lock:
                yield
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError, pa.ArrowException) as error:
            raise UserError(
                f"The files of the index in '{self.folder}' are damaged: {one_line(error)}. Embed again into another "
                "folder."
            ) from error


def _check_layout(file: pq.ParquetFile) -> list[int]:
    """The rows of each group; raises `ValueError` unless the table is as `write_blocks` writes it."""
    groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    chunks = ((group.num_rows, group.column(number)) for group in groups for number in range(group.num_columns))
    plain = all(
        chunk.compression == "UNCOMPRESSED"
        and set(chunk.encodings) <= {"PLAIN", "RLE"}
        and chunk.num_values <= MOST_CAPTIONS * rows
        and rows <= BLOCK_ROWS
        for rows, chunk in chunks
    )
    if not plain or not file.schema_arrow.equals(SCHEMA):
        raise ValueError(f"{ROWS} was not written by declip")
    return [group.num_rows for group in groups]


class Writer:
    """Writes all rows of an index into a locked folder; readers see the old ones until `finish`."""

    def __init__(self, folder: Path, wanted: IndexInfo) -> None:
        self.folder, self._unfinished = folder, folder / UNFINISHED
        self.info, self._precision = wanted.model_copy(update={"precision": ""}), wanted.precision
        self.indexed = 0  # rows of the index, which come first among those of `stores`
        for home in (folder, self._unfinished):
            if (home / INFO).is_file():
                begun = IndexInfo.read(home)
                check_same(folder, begun, wanted)
                for name in ("created", "dimension", "precision"):
                    setattr(self.info, name, getattr(begun, name))
                if home == folder:
                    self.info.generation, self.info.next_id, self.indexed = begun.generation, begun.next_id, begun.rows

    def stores(self) -> Iterator[Store]:
        """The rows that can be copied: of the index, and of the blocks that this call and killed ones embedded."""
        # One after another, because each has an open file.
        if self.info.generation:
            yield open_index(self.folder)[1]
        for path in self._blocks():
            # A block numbers its rows from 0 on.
            yield Store(path, self.folder, self.info.model_copy(update={"next_id": BLOCK_ROWS}))

    def add(self, block: Block) -> None:
        """Save rows that were embedded, so that a later call copies them if this one is killed."""
        self.info.dimension = block.matrices["images"].shape[1]
        if self._precision not in self.info.precision.split(", "):
            self.info.precision = ", ".join(filter(None, (self.info.precision, self._precision)))
        self.info.save(self._unfinished)
        write_blocks(self._unfinished / f"block-{len(self._blocks()):06d}", [block], len(block.table))

    def finish(self, positions: np.ndarray, skipped: SkipCounter) -> None:
        """Make an index of the rows of `stores` whose `positions` (n,) in the source are not negative."""
        rows, old = int((positions >= 0).sum()), positions[: self.indexed]
        unchanged = rows == self.indexed and np.array_equal(old, next(self.stores()).numbers("place"))
        self.replace(None if unchanged else self._copied(positions), rows, skipped)

    def replace(self, blocks: Iterable[Block] | None, rows: int, skipped: SkipCounter) -> None:
        """Make blocks of `rows` rows the index; None: its files stay."""
        self.info.rows, self.info.skipped = rows, skipped.to_dict()
        if blocks is not None:
            target = self.info.model_copy(update={"generation": self.info.generation + 1})
            write_blocks(_files(self.folder, target), blocks, rows)
            self.info.generation = target.generation
        self.info.save(self.folder)  # from here on readers see the new rows
        for path in self.folder.glob("generation-*"):
            if path != _files(self.folder, self.info):
                remove(path)
        if self._unfinished.exists():  # in one step: `locked_folder` removes the rest if this is killed
            remove(self._unfinished.rename(self.folder / f"{UNFINISHED}.partial"))

    def _copied(self, positions: np.ndarray) -> Iterator[Block]:
        """The rows with their new positions; those of blocks get ids now."""
        start = 0
        for store in self.stores():
            start, own = start + len(store.ids), positions[start : start + len(store.ids)]
            for block in store.blocks(own):
                if store.folder.parent == self._unfinished:
                    ids = pa.array(np.arange(len(block.table)) + self.info.next_id)
                    self.info.next_id += len(ids)
                    block = replace(block, table=block.table.set_column(0, SCHEMA.field("id"), ids))
                yield block

    def _blocks(self) -> list[Path]:
        return sorted(self._unfinished.glob("block-*"))


def describe_model(model: Encoder, path: object, index: Path) -> ModelInfo:
    """Describe a model that was loaded from `path`, or is a Python object, for the index in a folder."""
    stored = stored_path(path, index)
    recipe = getattr(model, "recipe", None)
    name = str(path) if stored else f"{type(model).__name__} {getattr(recipe, 'name', '')}".strip()
    return ModelInfo(path=stored, name=name, fingerprint=fingerprint(model))


@contextmanager
def open_writer(folder: Path, wanted: IndexInfo) -> Iterator[Writer]:
    """Lock the folder of an index, created if missing, and open it for writing."""
    # A call that was killed just before its first index.json leaves the first generation.
    killed = (folder / "generation-1" / ROWS).is_file() and not (folder / INFO).exists()
    with locked_folder(folder, "generation-1" if killed else INFO, ELSEWHERE):
        yield Writer(folder, wanted)


def open_index(folder: Path) -> tuple[IndexInfo, Store]:
    """Open the newest generation of an index, also while another process writes the next one."""
    info = IndexInfo.read(folder)
    while True:
        try:
            return info, Store(_files(folder, info), folder, info)
        except FileNotFoundError as error:
            newer = IndexInfo.read(folder)  # the generation was replaced after its name was read
            if newer.generation == info.generation:
                raise UserError(
                    f"A file of the index '{folder}' is missing ({error}). Embed again into another folder."
                ) from error
            info = newer


def _files(folder: Path, info: IndexInfo) -> Path:
    """The folder with the files of a generation."""
    return folder / f"generation-{info.generation}"


def check_same(folder: Path, before: IndexInfo, now: IndexInfo) -> None:
    """Raise a `UserError` if an index was made by another model, of another source, or with other options."""
    one, other = (
        {
            "the source": resolve(info.source.path, folder) or info.source.name,
            **asdict(info.source.columns_of(folder)),
            "dtype": info.dtype,
            "captions": info.captions,
        }
        for info in (before, now)
    )
    changed = [f"{key} was {one[key]!r}, now {other[key]!r}" for key in one if one[key] != other[key]]
    if before.model.fingerprint != now.model.fingerprint:
        changed.insert(0, f"the model was {before.model}, now {now.model}")
    if changed:
        raise UserError(
            f"'{folder}' holds an index of another model or option: {'; '.join(changed)}. Choose another folder: "
            "--out of embed, --index of choose and app."
        )
