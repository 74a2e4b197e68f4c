"""Small tables for the tests in every format, and what is said of a row or a table that cannot be read."""

import csv
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip.data.pair import BrokenPair
from declip.data.sources.open import open_source
from declip.errors import UserError

KINDS = ["jsonl", "csv", "tsv", "parquet"]


def write(path, rows, names=("image", "caption")):
    """Write rows in the format of the path's extension."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({name: [row[place] for row in rows] for place, name in enumerate(names)}), path)
    else:
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows([names, *rows])
    return path


def reason_of(source, index):
    with pytest.raises(BrokenPair) as caught:
        source[index]
    return caught.value.reason


def message(*arguments, **options):
    with pytest.raises(UserError) as caught:
        open_source(*arguments, **options)
    return str(caught.value)
