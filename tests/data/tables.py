"""Small tables for the tests in every format, and what is said of a row or a table that cannot be read."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip.data.pair import BrokenPair
from declip.data.sources.open import open_source
from declip.errors import UserError

KINDS = ["jsonl", "csv", "tsv", "parquet"]


def write(path, rows):
    """Write rows of (image, caption) in the format of the path's extension."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"image": [i for i, _ in rows], "caption": [c for _, c in rows]}), path)
    else:
        mark = "," if path.suffix == ".csv" else "\t"
        path.write_text("".join(f"{i}{mark}{c}\n" for i, c in [("image", "caption"), *rows]))
    return path


def reason_of(source, index):
    with pytest.raises(BrokenPair) as caught:
        source[index]
    return caught.value.reason


def message(*arguments, **options):
    with pytest.raises(UserError) as caught:
        open_source(*arguments, **options)
    return str(caught.value)
