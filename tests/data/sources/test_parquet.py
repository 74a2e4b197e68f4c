"""Parquet tables of one file and of several, and large tables of every format, which are read from a mapped file."""

import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.fakes import KINDS, message, reason_of, write
from declip.data.sources import rows as table_rows
from declip.data.sources.open import open_source
from declip.data.sources.table import TableSource


def content(folder, name):
    return (folder / f"{name}.png").read_bytes()


def parquet(folder, images, captions):
    pq.write_table(pa.table({"image": images, "caption": captions}), folder / "t.parquet", row_group_size=2)
    return TableSource(folder / "t.parquet")


def test_parquet_bytes_and_lists_of_captions(folder):
    images = pa.array([content(folder, "a"), None, b"", content(folder, "c")], pa.binary())
    source = parquet(folder, images, [["x", "y "], ["z"], ["w"], []])
    assert (source[0].key, source[0].captions) == ("row 0", ("x", "y"))
    assert [reason_of(source, row) for row in (1, 2, 3)] == ["missing image", "missing image", "empty caption"]
    # --- other types of bytes
    files = [content(folder, name) for name in "aba"]
    size = max(map(len, files))
    fixed = pa.array([file.ljust(size, b"\0") for file in files], pa.binary(size))
    for images in (fixed, pa.array(files, pa.binary()).dictionary_encode()):
        source = parquet(folder, images, ["x", "y", "x"])
        assert [source[1].key, source[1].image.getpixel((0, 0)), source[1].captions] == ["row 1", (1, 1, 1), ("y",)]


def test_parquet_structs_of_bytes_and_path(folder):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": content(folder, "b"), "path": "lost.png"}, {"bytes": None, "path": "c.png"}, None]
    source = parquet(folder, pa.array(rows, kind), ["x", "y", "z"])
    assert [source.image(row).getpixel((0, 0)) for row in (0, 1)] == [(1, 1, 1), (2, 2, 2)]
    assert reason_of(source, 2) == "missing image"


def test_parquet_types_of_captions_and_text_that_is_not_utf8(folder):
    latin = [None, pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"x\xe9")]
    for captions, reason in (
        (pa.array(["x", None], pa.large_string()), "empty caption"),
        (pa.array(["x", None]).dictionary_encode(), "empty caption"),
        (pa.array([["x"], None], pa.large_list(pa.string())), "empty caption"),
        (pa.Array.from_buffers(pa.string(), 2, latin), "invalid text"),
    ):
        source = parquet(folder, ["a.png", "b.png"], captions)
        assert (source[0].captions, reason_of(source, 1)) == (("x",), reason)


def test_parquet_cut_short(folder):
    write(folder / "t.parquet", [("a.png", "x")] * 999)
    whole = (folder / "t.parquet").read_bytes()
    (folder / "t.parquet").write_bytes(whole[:-9])
    assert "is not a Parquet file" in message(folder / "t.parquet")
    (folder / "t.parquet").write_bytes(whole[:4] + bytes(60) + whole[64:])
    assert "cannot be read" in message(folder / "t.parquet")


@pytest.mark.parametrize("kind", KINDS)
def test_large_tables_are_read_from_a_mapped_file_made_once(folder, cache, monkeypatch, kind):
    monkeypatch.setattr(table_rows, "LARGE_TABLE", 1)
    rows = [("abc"[i % 3] + ".png", f"said {i}") for i in range(50)]
    path = write(folder / f"t.{kind}", rows)
    source = TableSource(path)
    made = list((cache / "tables").rglob("*.arrow"))
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


@pytest.fixture
def parts(folder):
    """A folder of two files, whose bytes are images; the first image is in both."""
    made = folder / "parts"
    made.mkdir()
    (made / "._train-0.parquet").write_bytes(b"of macOS")
    a, b, c = (content(folder, name) for name in "abc")
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
    assert [source.key(n) for n in range(len(source))] == [f"row {n}" for n in range(4)]
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
    assert (source[1].captions, source[1].image.getpixel((0, 0))) == (("blue",), (1, 1, 1))
