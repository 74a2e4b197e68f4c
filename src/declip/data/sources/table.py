"""Pairs from a table: JSONL, CSV, TSV or Parquet, with an image path or image bytes and captions in each row."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from declip.data.columns import DEFAULT, Columns, Missing, MissingColumns
from declip.data.images.decode import image_below
from declip.data.pair import BrokenPair, OnDemand, as_texts, clean_captions, printable
from declip.data.sources.entry import EntrySource
from declip.data.sources.names import BRACES, holds, is_url, names_shards
from declip.data.sources.rows import (
    NOT_UTF8,
    DelimitedRows,
    JsonRows,
    ParquetRows,
    TableRows,
    by_lower_name,
    cell_name,
    label_names,
    label_text,
    named,
)
from declip.data.sources.subset import COLUMN, UNKNOWN, UNREADABLE, numbers_of, split_numbers
from declip.errors import UserError
from declip.io.cache import cached_table
from declip.io.text import one_line

# Column names of public sets, most telling first; tried when the default column is missing.
IMAGE_NAMES = (
    "image",
    "file_name",
    "image_path",
    "filepath",
    "file_path",
    "path",
    "filename",
    "image_file",
    "img",
    "file",
)
CAPTION_NAMES = ("caption", "captions", "text", "texts", "title", "description", "sentences")
# Never tried, but named where captions are guessed
OTHER_TEXTS = ("keywords", "tags", "alt", "alt_text")
# Once per process, however often the table is opened
warn_once = cache(logging.getLogger("declip").warning)

Captions = dict[str, tuple[str, ...]]
"""Columns and templates of captions, with the columns that each reads: for a column itself."""

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
        root = self.file.folder if columns.root is None else columns.root
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise UserError(f"There is no folder '{self.root}', to which image paths are relative.")
        image, self._captions, group = find_columns(names, columns, path)
        self.captions_from = " | ".join(map(printable, self._captions))
        split = by_lower_name(names).get(COLUMN)
        # --- the columns, the image first, and the rows of each pair
        texts = list[str]()
        labels = list[str]()
        for text, read in self._captions.items():
            (texts if read == (text,) else labels).extend(name for name in read if name != image)
        wanted = (image, *texts, *labels, group, split)
        self._columns = list(dict.fromkeys(filter(None, wanted)))
        self._label_names = {name: label_names(self.file, name) for name in self._columns}
        schema, batches = self.file.read(self._columns, texts, labels)
        self.table = self._held("cells", [self._columns, texts, labels], schema, batches)
        # Hashing images pays only if their captions are merged.
        captioned = bool(texts or labels)
        grouped = _grouped(self.table.column(0), hashed=captioned)
        schema = pa.schema([("rows", pa.large_list(pa.int64()))])
        held = self._held("rows", [image, captioned], schema, grouped)
        self._pairs = held["rows"].chunk(0)
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

    def __len__(self) -> int:
        return len(self._pairs)

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        return TableSource, self._arguments  # a worker process opens the table itself

    def entry(self, index: int) -> tuple[str, list[int]]:
        """The image's path, else the number of its row or line; the numbers of the rows, which show one image."""
        rows = self._pairs[index].as_py()
        key, *_ = map(self._row_key, rows)
        image = self.table.column(0)[rows[0]]
        path = None if is_bytes(image.type) else decoded(image, key)
        return path if path and isinstance(path, str) else key, rows

    def cell(self, key: str, row: int, column: str) -> Any:
        """The cell of a pair's row, or the name of the class that it numbers; raises `BrokenPair`."""
        cells = self._column(column)
        value = b"" if is_bytes(cells.type) else decoded(cells[row], key)
        return named(value, self._label_names[column])

    def texts(self, key: str, rows: list[int]) -> tuple[str, ...]:
        cells = [partial(self.cell, key, row) for row in rows]
        return read_captions(self._captions, cells, "unreadable row", key)

    def _column(self, name: str) -> pa.ChunkedArray:
        return self.table.column(self._columns.index(name))

    def _groups(self, column: str) -> np.ndarray:
        """The group of each pair, by the cell of its first row."""
        return numbers_of(self._column(column), group_number, 0)[self._rows[self._starts]]

    def _splits(self, column: str) -> np.ndarray:
        """The split of each pair. A pair with rows in several is in the last: test before train."""
        # In text files null is a row that cannot be read.
        missing = UNKNOWN if isinstance(self.file, ParquetRows) else UNREADABLE
        where = f"Column '{column}' of '{self.name}'"
        numbers = split_numbers(self._column(column), where, missing)
        return np.maximum.reduceat(numbers[self._rows], self._starts)

    def _texts(self, column: str) -> list[tuple[str, ...]]:
        """The different cells of each pair's rows."""
        labels = label_names(self.file, column)
        cells = list[str]()
        for batch in self.file.read([column], labels=[column])[1]:
            cells += [label_text(named(cell, labels)) for cell in batch[column].to_pylist()]
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
        image = decoded(cell, key)
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
        return Path(os.path.normpath(self.root / os.path.expanduser(image)))

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

    def _held(self, kind: str, options: list[Any], schema: pa.Schema, batches: Any) -> pa.Table:
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
    if not path.is_file() or path.suffix.lower() not in KINDS:
        raise UserError(
            f"'{path.name}' is not a table of {', '.join(TABLE_KINDS)}. Save it as CSV in UTF-8."
        )
    return KINDS[path.suffix.lower()](path)


def find_table(spec: str | Path) -> Path | None:
    """The table that a name means: a file, Parquet files, a folder's metadata; None for other sources."""
    text = str(spec)
    path = Path(spec).expanduser()
    if path.is_dir():
        for name in METADATA:
            if (path / name).is_file():
                return path / name
        return path if holds(path, ".parquet") and not holds(path, ".tar") else None
    if path.suffix.lower() in KINDS and path.exists():
        return path
    several = names_shards(text) and text.lower().endswith(".parquet")
    return path if several and not is_url(text) else None


def find_columns(
    names: Sequence[str], columns: Columns, where: Path | str
) -> tuple[str, Captions, str | None]:
    """Find the columns of images, of captions (that of images where none is read) and of groups."""
    header = Header(names, where)
    image = header.column(columns.image, IMAGE_NAMES, "image")
    captions: Captions = {image: (image,)}
    if columns.caption is not None and columns.caption != columns.image:
        captions = header.captions(columns.caption)
    group = columns.group and header.column(columns.group, ("",), "group")
    if header.missing:
        raise MissingColumns(str(where), names, header.missing)
    return image, captions, group


@dataclass(frozen=True)
class Header:
    """The columns of a table, and those that were looked for and are missing."""

    names: Sequence[str]
    where: Path | str
    missing: Missing = field(default_factory=dict)

    def column(self, given: str, usual: Sequence[str], what: str) -> str:
        """Find a column by its name or, if that is the missing `usual[0]`, by another usual name in any case."""
        names = [given]
        if given == usual[0]:
            lower = by_lower_name(self.names)
            names += [lower[name] for name in usual if name in lower]
        column = next((name for name in names if name in self.names), None)
        if column is None:
            self.missing[given] = what
            return given
        if (count := list(self.names).count(column)) > 1:
            columns = f"{count} columns named '{printable(column)}'"
            raise UserError(f"The table '{self.where}' has {columns}. Rename all but one.")
        return column

    def captions(self, given: str | Sequence[str]) -> Captions:
        """Find the columns of captions, which commas may separate, and of templates."""
        if given == CAPTION_NAMES[0]:
            caption = self.column(given, CAPTION_NAMES, "caption")
            lower = by_lower_name(self.names)
            others = [lower[name] for name in (*CAPTION_NAMES, *OTHER_TEXTS) if name in lower]
            unused = ", ".join(printable(name) for name in others if name != caption)
            if caption != given and unused:
                problem = f"Captions of '{Path(self.where).name}': {caption}. Not used: {unused}."
                remedy = "Name one or several by data.columns.caption in training, --caption-column elsewhere."
                warn_once(f"{problem} {remedy}")
            return {caption: (caption,)}
        captions = Captions()
        for text in (given,) if isinstance(given, str) else given:
            if text not in self.names and (read := BRACES.findall(text)):
                captions[text] = tuple(read)
            else:
                listed = [text] if text in self.names else map(str.strip, text.split(","))
                captions |= {name: (name,) for name in listed}
        for name in chain.from_iterable(captions.values()):
            self.column(name, ("",), "caption")
        return captions


def read_captions(
    captions: Captions, rows: Iterable[Callable[[str], Any]], reason: str, key: str
) -> tuple[str, ...]:
    """The cleaned captions in rows of one image, which return the cell of a column; raises `BrokenPair`.

    A template with an empty cell gives no caption.
    """
    texts = list[str | None]()
    empty = dict[str, None]()
    for cell in rows:
        for text, columns in captions.items():
            if columns == (text,):
                texts += as_texts(cell(text), reason, key)
                continue
            values = {name: label_text(cell(name)) for name in columns}
            empty |= dict.fromkeys(name for name, value in values.items() if not value)
            if all(values.values()):
                pieces = BRACES.split(text)  # a text, a name, a text, a name … a text
                pieces[1::2] = map(values.__getitem__, columns)
                texts.append("".join(pieces))
    return clean_captions(texts, key, f"no {', '.join(empty)}" if empty else "")


def group_number(cell: Any) -> int:
    """A hash of a group's cell, 63 bits; 0 where the cell is empty."""
    if not (name := cell_name(cell).strip()):
        return 0
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) >> 1 | 1


def decoded(cell: pa.Scalar, key: str) -> Any:
    """The value of a cell; raises `BrokenPair`."""
    try:
        return cell.as_py()
    except UnicodeDecodeError as error:
        raise BrokenPair("invalid text", key, NOT_UTF8) from error


def _grouped(images: pa.ChunkedArray, hashed: bool) -> Iterator[pa.RecordBatch]:
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
        path = cell["path"] if cell.type.get_field_index("path") >= 0 else None
        cell = cell["bytes"]
    if cell.is_valid and (content := cell.as_buffer()).size:
        return hashlib.blake2b(content, digest_size=16).digest()
    return path.as_buffer().to_pybytes() if path is not None and path.is_valid else b""


def has_values(kind: pa.DataType) -> bool:
    """Whether a column of this type holds strings or whole numbers."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
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
