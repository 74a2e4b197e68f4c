"""Several Parquet files as one table, and a folder of images with metadata."""

import pickle
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.tables import message, reason_of, write
from declip.data.sources import rows as table_rows
from declip.data.sources.open import open_source


@pytest.fixture
def parts(folder):
    """A folder of two files, whose bytes are images; the first image is in both."""
    made = folder / "parts"
    made.mkdir()
    (made / "._train-0.parquet").write_bytes(b"of macOS")
    a, b, c = ((folder / f"{name}.png").read_bytes() for name in "abc")
    pq.write_table(pa.table({"image": [a, b], "text": ["x", "y"], "label": [0, 1]}), made / "train-0.parquet")
    pq.write_table(
        pa.table({"image": [b"", c, a], "text": ["w", "z", "v"], "label": [0, 0, 0]}), made / "train-1.parquet"
    )
    return made


@pytest.mark.parametrize("large", [0, 1 << 30])
@pytest.mark.parametrize("name", ["", "/*.parquet", "/train-{0..1}.parquet"])
@pytest.mark.usefixtures("cache")
def test_a_folder_or_a_pattern_is_one_table(parts, name, large, monkeypatch):
    monkeypatch.setattr(table_rows, "LARGE_TABLE", large)
    source = open_source(f"{parts}{name}")
    assert [source.key(n) for n in range(4)] == [f"row {n}" for n in range(4)]
    assert len(source) == 4
    assert source[0].captions == ("x", "v")
    assert reason_of(source, 2) == "missing image"
    assert source[3].image.getpixel((0, 0)) == (2, 2, 2)
    assert pickle.loads(pickle.dumps(source))[3].captions == ("z",)


def test_files_that_are_not_one_table_are_refused(parts):
    write(parts / "train-2.parquet", [("a.png", 1)], ("image", "number"))
    assert "train-2.parquet" in message(parts)
    write(parts / "train-2.parquet", [("a.png", "x", 1)], ("image", "text", "label"))
    assert "image" in message(parts), "a path instead of bytes"
    shutil.move(parts / "train-2.parquet", parts / "test-0.parquet")
    assert "test, train" in message(parts)
    assert len(open_source(parts / "train*.parquet")) == 4
    (parts / "train-1.parquet").write_bytes(b"PAR1")
    assert "train-1.parquet" in message(parts / "train*.parquet")
    assert "none*.parquet" in message(parts / "none*.parquet")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_folder_with_metadata_is_a_table(folder, kind):
    (folder / "a.txt").write_text("not this")
    write(folder / f"metadata.{kind}", [("a.png", "/x", "red"), ("b.png", "/y", "blue")], ("file_name", "path", "text"))
    source = open_source(folder)
    assert [source.key(n) for n in range(len(source))] == ["a.png", "b.png"]
    assert source[1].captions == ("blue",)
    assert source[1].image.getpixel((0, 0)) == (1, 1, 1)
