"""Pairs from a table: JSONL, CSV, TSV or Parquet, with an image path or image bytes and captions in each row."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from declip.data.columns import DEFAULT, Columns
from declip.data.images.decode import image_below
from declip.data.pair import BrokenPair, OnDemand, printable
from declip.data.sources.entry import EntrySource
from declip.data.sources.header import find_columns, read_captions
from declip.data.sources.names import holds, is_url, names_shards
from declip.data.sources.rows import (
    NOT_UTF8,
    DelimitedRows,
    JsonRows,
    ParquetRows,
    TableRows,
    by_lower_name,
    class_name,
    label_names,
    label_text,
)
from declip.data.sources.splits import (
    COLUMN,
    UNKNOWN,
    UNREADABLE,
    group_number,
    numbers_of,
    split_numbers,
)
from declip.errors import UserError
from declip.io.cache import cached_table
from declip.io.text import one_line

KINDS: dict[str, Callable[[Path], TableRows]] = {
    ".jsonl": JsonRows,
    ".json": JsonRows,  # the official list of YFCC15M is named so
    ".csv": partial(DelimitedRows, delimiter=","),
    ".tsv": partial(DelimitedRows, delimiter="\t"),
    ".parquet": ParquetRows,
}
TABLE_KINDS = tuple(KINDS)
# Tables in a folder of images, as Hugging Face's ImageFolder has them: column `file_name` and any others.
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
LAYOUT = 2  # raised when a file in the cache changes its meaning


class TableSource(EntrySource):
    """Pairs from the rows of a table, in memory or mapped from the cache; rows of one image are one pair."""

    def __init__(self, path: str | Path, columns: Columns = DEFAULT) -> None:
        self._arguments = (path, columns)
        self.file = open_rows(path)
        path = self.file.path
        names = self.file.columns
        self.name = path.name
        self.confined = columns.root is not None
        self.root = self._find_root(columns.root)
        image, self._captions, group = find_columns(names, columns, path)
        self.captions_from = " | ".join(map(printable, self._captions))
        split = by_lower_name(names).get(COLUMN)
        # --- the cells of the columns that are read, those of the image first
        texts, labels = self._columns_of_captions(image)
        wanted = (image, *texts, *labels, group, split)
        self._columns = list(dict.fromkeys(filter(None, wanted)))
        self._label_names = {name: label_names(self.file, name) for name in self._columns}
        schema, batches = self.file.read(self._columns, texts, labels)
        self.table = self._load("cells", [self._columns, texts, labels], schema, batches)
        # --- the rows of each pair
        self._pairs = self._group_pairs(image, captioned=bool(texts or labels))
        # (rows,) those of each pair, and (pairs,) where these begin
        self._rows = self._pairs.flatten().to_numpy()
        self._starts = self._pairs.offsets.to_numpy()[:-1]
        if not len(self):
            raise UserError(f"The table '{path}' has no rows. It needs one for each pair.")
        # --- columns by pair
        numbers = dict[str, Callable[[], np.ndarray]]()
        if group:
            numbers["group"] = partial(self._groups, group)
        if split:
            numbers["split"] = partial(self._splits, split)
        self.columns = OnDemand(numbers)
        once = [name for name, count in Counter(names).items() if count == 1]
        self.cells = OnDemand({name: partial(self._texts, name) for name in once})

    def _find_root(self, given: str | Path | None) -> Path:
        """The folder that image paths are relative to: the given one, or that of the file."""
        root = Path(self.file.folder if given is None else given).expanduser()
        if not root.is_dir():
            raise UserError(f"There is no folder '{root}', to which image paths are relative.")
        return root

    def _columns_of_captions(self, image: str) -> tuple[list[str], list[str]]:
        """The columns that are captions, and those that are parts of templates, without the image's."""
        texts = list[str]()
        labels = list[str]()
        for text, read in self._captions.items():
            kind = texts if read == (text,) else labels
            kind += [name for name in read if name != image]
        return texts, labels

    def _group_pairs(self, image: str, captioned: bool) -> pa.LargeListArray:
        """The rows of each pair, (pairs, ...)."""
        # Hashing images pays only if their captions are merged.
        groups = _group_rows(self.table.column(0), hashed=captioned)
        schema = pa.schema([("rows", pa.large_list(pa.int64()))])
        return self._load("rows", [image, captioned], schema, groups)["rows"].chunk(0)

    def __len__(self) -> int:
        return len(self._pairs)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return TableSource, self._arguments  # a worker process opens the table itself

    def entry(self, index: int) -> tuple[str, list[int]]:
        """The image's path, else the number of its row or line; the numbers of the rows, which show one image."""
        rows = self._pairs[index].as_py()
        key, *_ = map(self._row_key, rows)
        image = self.table.column(0)[rows[0]]
        if not is_bytes(image.type):
            path = cell_value(image, key)
            if path and isinstance(path, str):
                key = path
        return key, rows

    def cell(self, key: str, row: int, column: str) -> Any:
        """The cell of a pair's row, or the name of the class that it numbers; raises `BrokenPair`."""
        cells = self._column(column)
        value = b""
        if not is_bytes(cells.type):
            value = cell_value(cells[row], key)
        return class_name(value, self._label_names[column])

    def texts(self, key: str, rows: list[int]) -> tuple[str, ...]:
        cells = [partial(self.cell, key, row) for row in rows]
        return read_captions(self._captions, cells, "unreadable row", key)

    def _column(self, name: str) -> pa.ChunkedArray:
        return self.table.column(self._columns.index(name))

    def _groups(self, column: str) -> np.ndarray:
        """The group of each pair, by the cell of its first row."""
        numbers = numbers_of(self._column(column), group_number, 0)
        return numbers[self._rows[self._starts]]

    def _splits(self, column: str) -> np.ndarray:
        """The split of each pair. A pair with rows in several is in the last: test before train."""
        missing = UNREADABLE  # in text files null is a row that cannot be read
        if isinstance(self.file, ParquetRows):
            missing = UNKNOWN
        where = f"Column '{column}' of '{self.name}'"
        numbers = split_numbers(self._column(column), where, missing)
        return np.maximum.reduceat(numbers[self._rows], self._starts)

    def _texts(self, column: str) -> list[tuple[str, ...]]:
        """The different cells of each pair's rows."""
        labels = label_names(self.file, column)
        cells = list[str]()
        for batch in self.file.read([column], labels=[column])[1]:
            cells += [label_text(class_name(cell, labels)) for cell in batch[column].to_pylist()]
        pairs = self._pairs.to_pylist()
        return [tuple(dict.fromkeys(map(cells.__getitem__, rows))) for rows in pairs]

    def other_columns(self) -> dict[str, np.ndarray]:
        names = [name for name in self.cells if name not in self._columns]
        if isinstance(self.file, ParquetRows):
            types = self.file.arrow_schema
            names = [name for name in names if has_values(types.field(name).type)]
        if not names:
            return {}
        first = self._rows[self._starts]
        # These columns are not needed
        with suppress(UserError, pa.ArrowException, OSError, UnicodeDecodeError):
            schema, batches = self.file.read(names)
            table = pa.Table.from_batches(batches, schema)
            if len(table) != len(self.table):  # the file has changed since it was opened
                return {}
            return {name: numbers_of(table[name], group_number, 0)[first] for name in names}
        return {}

    def content(self, key: str, rows: list[int]) -> Path | bytes:
        cell = self.table.column(0)[rows[0]]
        image = cell_value(cell, key)
        if image and isinstance(cell, pa.StructScalar):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes) and image:
            return image
        if not image or not isinstance(image, str):
            raise BrokenPair("missing image", key, f"not a path: {str(image or '')[:40]}")
        if image.startswith(("http://", "https://")):
            raise BrokenPair(
                "missing image", key, "a web address; download the images and name the files"
            )
        if "\\" in image and not os.path.exists(self.root / image):
            image = image.replace("\\", "/")  # written on Windows
        if self.confined:
            return image_below(self.root, image, key, follow=True)
        path = self.root / os.path.expanduser(image)
        return Path(os.path.normpath(path))

    def _row_key(self, row: int) -> str:
        """The key of a row without an image; raises `BrokenPair` if the row is unreadable."""
        if isinstance(self.file, ParquetRows):
            return f"row {row}"
        *_, lines, faults = self.table.columns
        line = lines[row]
        fault = faults[row].as_py()
        if fault is not None:
            reason, _, detail = fault.partition(": ")
            raise BrokenPair(reason, f"line {line}", detail)
        return f"line {line}"

    def _load(self, kind: str, options: list[Any], schema: pa.Schema, batches: Any) -> pa.Table:
        """A table in memory or, if it is large, in the cache."""
        try:
            if not self.file.large:
                return pa.Table.from_batches(batches, schema)
            version: list[object] = [LAYOUT]
            for file in self.file.files:
                status = file.stat()
                version.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
            key = (*version, options)
            return cached_table(f"tables/{kind}", key, lambda: (schema, batches))
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{self.file.path}' cannot be read: {one_line(error)}.") from error


def open_rows(path: str | Path) -> TableRows:
    """Open the rows of a table: of a file, or of Parquet files by their folder or pattern."""
    path = Path(path).expanduser()
    if path.is_dir() or (not path.exists() and names_shards(str(path))):
        return ParquetRows(path)
    ending = path.suffix.lower()
    if not path.is_file() or ending not in KINDS:
        raise UserError(
            f"'{path.name}' is not a table of {', '.join(TABLE_KINDS)}. Save it as CSV in UTF-8."
        )
    return KINDS[ending](path)


def find_table(spec: str | Path) -> Path | None:
    """The table that a name means: a file, Parquet files, a folder's metadata; None for other sources."""
    text = str(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        for name in METADATA:
            file = path / name
            if file.is_file():
                return file
        if holds(path, ".parquet") and not holds(path, ".tar"):
            return path
        return None
    if path.suffix.lower() in KINDS and path.exists():
        return path
    several = names_shards(text) and text.lower().endswith(".parquet")
    if several and not is_url(text):
        return path
    return None


def cell_value(cell: pa.Scalar, key: str) -> Any:
    """The value of a cell; raises `BrokenPair`."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise BrokenPair("invalid text", key, NOT_UTF8) from error


def _group_rows(images: pa.ChunkedArray, hashed: bool) -> Iterator[pa.RecordBatch]:
    """Group the rows of one image, in the order of first rows; images as bytes only if `hashed`."""
    kind = images.type
    rows = np.arange(len(images))
    if pa.types.is_dictionary(kind):
        images = images.cast(kind.value_type)
    if is_bytes(kind) and not hashed:
        order = rows
        starts = np.arange(len(images) + 1)
    else:
        if is_bytes(kind):
            keys = pa.array(map(_key_of, images), pa.large_binary())
        else:
            keys = images.cast(pa.large_binary()).fill_null(b"").combine_chunks()
        codes = keys.dictionary_encode().indices.to_numpy()
        first = np.empty(len(keys), np.int64)
        first[codes[::-1]] = rows[::-1]  # the last value written for a code is its first row
        is_empty = np.asarray(pc.binary_length(keys)) == 0
        groups = np.where(is_empty, rows, first[codes])
        order = np.argsort(groups, kind="stable")
        changes = np.diff(groups[order], prepend=-1, append=len(keys))
        starts = np.flatnonzero(changes)
    pairs = pa.LargeListArray.from_arrays(starts, pa.array(order))
    yield pa.record_batch([pairs], ["rows"])


def _key_of(cell: pa.Scalar) -> bytes:
    """The hash of an image's bytes, else its path, else empty."""
    path = None
    if pa.types.is_struct(cell.type) and cell.is_valid:
        if cell.type.get_field_index("path") >= 0:
            path = cell["path"]
        cell = cell["bytes"]
    if cell.is_valid:
        content = cell.as_buffer()
        if content.size:
            return hashlib.blake2b(content, digest_size=16).digest()
    if path is not None and path.is_valid:
        return path.as_buffer().to_pybytes()
    return b""


def has_values(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings or whole numbers."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    strings = (pa.string(), pa.large_string(), pa.string_view())
    return kind in strings or pa.types.is_integer(kind)


def is_bytes(kind: pa.DataType) -> bool:
    """Whether a column of this type holds an image's bytes, or a struct with such a field."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if isinstance(kind, pa.StructType):
        return any(field.name == "bytes" and is_bytes(field.type) for field in kind)
    contents = (pa.binary(), pa.large_binary(), pa.binary_view())
    return kind in contents or pa.types.is_fixed_size_binary(kind)
