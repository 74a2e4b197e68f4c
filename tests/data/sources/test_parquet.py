"""Parquet tables, and large tables of every format, which are read from a mapped file."""

import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.tables import KINDS, message, reason_of, write
from declip.data.sources import rows as table_rows
from declip.data.sources.table import TableSource

# Parquet


def content(folder, name):
    return (folder / f"{name}.png").read_bytes()


def parquet(folder, images, captions):
    pq.write_table(pa.table({"image": images, "caption": captions}), folder / "t.parquet", row_group_size=2)
    return TableSource(folder / "t.parquet")


def test_parquet_bytes_and_lists_of_captions(folder):
    images = pa.array([content(folder, "a"), None, b"", content(folder, "c")], pa.binary())
    source = parquet(folder, images, [["x", "y "], ["z"], ["w"], []])
    assert (source[0].key, source[0].captions) == ("row 0", ("x", "y"))
    assert source[0].image.getpixel((0, 0)) == (0, 0, 0)
    assert reason_of(source, 1) == reason_of(source, 2) == "missing image"
    assert reason_of(source, 3) == "empty caption"


@pytest.mark.parametrize("kind", ["dictionary", "fixed"])
def test_parquet_bytes_of_other_types(folder, kind):
    files = [content(folder, name) for name in "aba"]
    if kind == "fixed":
        size = max(map(len, files))
        images = pa.array([file.ljust(size, b"\0") for file in files], pa.binary(size))
    else:
        images = pa.array(files, pa.binary()).dictionary_encode()
    source = parquet(folder, images, ["x", "y", "x"])
    assert [source[1].key, source[1].image.getpixel((0, 0)), source[1].captions] == ["row 1", (1, 1, 1), ("y",)]


def test_parquet_structs_of_bytes_and_path(folder):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": content(folder, "b"), "path": "lost.png"}, {"bytes": None, "path": "c.png"}, None]
    source = parquet(folder, pa.array(rows, kind), ["x", "y", "z"])
    assert source[0].image.getpixel((0, 0)) == (1, 1, 1)
    assert source[1].image.getpixel((0, 0)) == (2, 2, 2)
    assert reason_of(source, 2) == "missing image"


@pytest.mark.parametrize(
    "captions",
    [
        pa.array(["x", None], pa.large_string()),
        pa.array(["x", None]).dictionary_encode(),
        pa.array([["x"], None], pa.large_list(pa.string())),
    ],
)
def test_parquet_types_of_captions(folder, captions):
    source = parquet(folder, ["a.png", "b.png"], captions)
    assert source[0].captions == ("x",)
    assert reason_of(source, 1) == "empty caption"


def test_parquet_that_is_not_utf8_breaks_the_row(folder):
    text = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"x\xe9")]
    )
    source = parquet(folder, ["a.png", "b.png"], text)
    assert source[0].captions == ("x",)
    assert reason_of(source, 1) == "invalid text"


def test_parquet_cut_short(folder):
    write(folder / "t.parquet", [("a.png", "x")] * 999)
    whole = (folder / "t.parquet").read_bytes()
    (folder / "t.parquet").write_bytes(whole[:-9])
    assert "is not a Parquet file" in message(folder / "t.parquet")
    (folder / "t.parquet").write_bytes(whole[:4] + bytes(60) + whole[64:])
    assert "cannot be read" in message(folder / "t.parquet")


# Large tables


@pytest.fixture
def cached(folder, monkeypatch):
    """The folder, in which every table is large."""
    monkeypatch.setenv("DECLIP_CACHE", str(folder / "cache"))
    monkeypatch.setattr(table_rows, "LARGE_TABLE", 1)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_large_tables_are_read_from_a_mapped_file_made_once(cached, kind):
    rows = [("abc"[i % 3] + ".png", f"said {i}") for i in range(50)]
    path = write(cached / f"t.{kind}", rows)
    source = TableSource(path)
    made = list((cached / "cache/tables").rglob("*.arrow"))
    assert len(made) == 2
    for again in (source, TableSource(path), pickle.loads(pickle.dumps(source))):
        assert [again.captions(i)[:2] for i in range(3)] == [(f"said {i}", f"said {i + 3}") for i in range(3)]
        assert again[2].key == "c.png"
    stamps = [file.stat().st_mtime_ns for file in made]
    assert [file.stat().st_mtime_ns for file in made] == stamps
    for file in made:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert TableSource(path).captions(1)[0] == "said 1"
    write(path, rows[1:])
    assert TableSource(path).captions(0)[0] == "said 1"
