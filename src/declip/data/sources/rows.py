"""The rows of a table's file as Arrow batches, and those of Parquet files."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from declip.data.sources.shard_files import expand, files_in
from declip.errors import UserError

# Bytes of a file (decompressed), and rows of a Parquet file, beyond which what is read is kept in a cache file.
LARGE_TABLE, MANY_ROWS = 32 << 20, 250_000

# Bytes that the columns of a Parquet file may take, and their largest ratio to the file's size beyond that.
MOST_IN_PARQUET, MOST_GROWTH = 1 << 30, 100

# Rows of a Parquet file read at a time: they may hold images, or a value that is stored once and repeated in all.
ROWS_AT_ONCE = 512

# Splits that begin the names of Parquet files, as the Hub has them: `train-00000-of-00002.parquet`.
SPLIT = re.compile("(train|val|dev|test)(?![a-z])|validation", re.IGNORECASE)

NOT_UTF8 = "not UTF-8; if the file is Latin-1, convert it: iconv -f latin1 -t utf-8"


def by_lower_name(columns: Sequence[str]) -> dict[str, str]:
    """Columns by their names without case; the first of several."""
    return {name.strip().lower(): name for name in reversed(columns)}


def cell_name(cell: Any) -> str:
    """A cell as the text that names a split, a group, a class or a path; empty for none, for NaN, and for a list."""
    empty = cell is None or isinstance(cell, list | dict) or (isinstance(cell, float) and cell != cell)
    return "" if empty else str(cell)


class TableRows(ABC):
    """A table's file or files, its columns, and reading some of them."""

    columns: Sequence[str]
    metadata: Mapping[bytes, bytes] = MappingProxyType({})  # of Parquet

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.parent  # the folder that image paths are relative to
        self.files = [path]
        self.large = path.is_file() and path.stat().st_size > LARGE_TABLE  # what is read goes to a cache file

    @abstractmethod
    def read(self, wanted: Sequence[str], captions: str | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """The rows of some columns, one of which may hold captions.

        Text files have two more columns, the number of a row's line and its fault.
        """


class ParquetRows(TableRows):
    """A Parquet file, or several: those of a folder or a pattern, in the order of their names.

    Images are paths, bytes, or structs of `bytes` and `path`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        if path.is_dir():
            self.files = list(map(Path, files_in(path, ".parquet")))
            splits = {name[0].lower() for file in self.files if (name := SPLIT.match(file.name))}
            if len(splits) > 1:
                one = path / f"{min(splits)}*.parquet"
                raise UserError(f"'{path}' has the splits {', '.join(sorted(splits))}. Name the files of one: '{one}'.")
        elif not path.is_file():
            self.files = [Path(file) for file in expand(str(path))]
        self.folder = Path(os.path.commonpath([file.parent for file in self.files]))
        footers = [_footer(file) for file in self.files]
        self.arrow_schema = footers[0].schema.to_arrow_schema()
        self.columns, self.metadata = self.arrow_schema.names, self.arrow_schema.metadata or {}
        self._rows = [footer.num_rows for footer in footers]
        # Counted over all columns: asking pyarrow 26 for one column ends the process where the file is damaged.
        size = sum(data.row_group(group).total_byte_size for data in footers for group in range(data.num_row_groups))
        self.large = size > LARGE_TABLE or sum(self._rows) > MANY_ROWS

    def read(self, wanted: Sequence[str], captions: str | None) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        schema = pa.schema([self.arrow_schema.field(name) for name in wanted])

        def batches() -> Iterator[pa.RecordBatch]:
            for path, count in zip(self.files, self._rows, strict=True):
                yield from self._batches(path, count, schema)

        return schema, batches()

    def _batches(self, path: Path, count: int, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        """The columns of one of the files, which has `count` rows."""
        file, most = pq.ParquetFile(path), max(MOST_GROWTH * path.stat().st_size, MOST_IN_PARQUET)
        types = {field.name: field.type for field in file.schema_arrow}
        if other := [field.name for field in schema if types.get(field.name) != field.type]:
            raise UserError(
                f"Column '{other[0]}' of '{self.files[0]}' is missing in '{path}' or of another type. Files of one "
                "table have the same columns; name the others as another source."
            )
        size = rows = 0
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=schema.names):
            size, rows = size + batch.nbytes, rows + len(batch)
            if size > most:
                raise UserError(f"'{path}' is not read: its columns take more than {most:,} bytes.")
            # Rebuilt, since fields of the same type may differ in nullability and metadata.
            yield pa.RecordBatch.from_arrays(batch.select(schema.names).columns, schema=schema)
        if rows != count:
            raise UserError(f"'{path}' cannot be read: it says {count:,} rows and has {rows:,}.")


def _footer(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not a Parquet file: {str(error).rstrip('.')}.") from error
