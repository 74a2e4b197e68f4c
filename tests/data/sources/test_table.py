"""Tables of pairs: paths, columns, broken rows, what each format may hold; several files as one; large tables."""

import csv
import io
import json
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import refuses
from data.fakes import KINDS, message, reason_of, write
from declip.data.columns import Columns
from declip.data.sources import rows as table_rows
from declip.data.sources.header import find_columns
from declip.data.sources.open import open_source
from declip.data.sources.subset import take
from declip.data.sources.table import TableSource


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_row_leaves_the_others(folder, kind):
    (folder / "text.jpg").write_text("I am text")
    rows = [("a.png", "x" * 100_000), ("none.png", "gone"), ("text.jpg", "words")]
    rows += [("b.png", " "), ("", "no path")]
    source = TableSource(write(folder / f"t.{kind}", [*rows, ("c.png", "good")]))
    assert [reason_of(source, index) for index in range(5)] == [
        "caption too long", "missing image", "unreadable image", "empty caption", "missing image",
    ]  # fmt: skip
    place = {"jsonl": "line 5", "csv": "line 6", "tsv": "line 6", "parquet": "row 4"}[kind]
    assert (source[4].key, source[5].captions()) == (place, ("good",))


def test_usual_names_are_found_where_no_other_is_given():
    def found(columns, given="image"):
        return find_columns(columns, Columns(given, None), "t.csv")[0]

    assert found(["caption", "image"]) == "image"
    assert found(["url", "FilePath", "title"]) == "FilePath"
    assert found(["filename", "image_path"]) == "image_path"
    assert found(["Image ", "caption"]) == "Image "
    assert found(["caption", "file"]) == "file"
    for columns, given in ((["picture", "p"], "image"), (["picture", "path"], "filename")):
        refuses(f"no column '{given}'", found, columns, given)
    refuses("2 columns named 'image'", found, ["image", "image"], "image")
    refuses("Its columns: 'a.png', 'a cat'", found, ["a.png", "a cat"], "image")


@pytest.mark.parametrize(
    ("names", "unused"),
    [(("title", "description", "Tags"), "Not used: description, Tags."), (("title", "price"), ""),
     (("caption", "title"), "")],
)  # fmt: skip
def test_a_guess_among_several_columns_of_captions_is_said_once(
    folder, caplog, monkeypatch, names, unused
):
    row = ("a.png", *"xyz"[: len(names)])
    path = write(folder / f"{len(names)}{names[0]}.csv", [row], ("image", *names))
    monkeypatch.chdir(folder)
    assert [open_source(each)[0].captions() for each in (path, path.name)] == [("x",)] * 2
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(unused)
    assert all(unused in each and "data.columns.caption" in each for each in said)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_with_nothing_in_them(folder, kind):
    path = folder / f"t.{kind}"
    path.touch()
    refuses("no column 'image'|is not a Parquet file", open_source, path)
    refuses("no column 'image'|no rows|cast from null", open_source, write(path, []))


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_image_are_one_pair(folder, kind):
    rows = ["b.png|first", "|lost", "a.png|second", "b.png|third", "b.png|first"]
    rows += ["a.png| ", "|lost too"]
    source = TableSource(write(folder / f"t.{kind}", [tuple(row.split("|")) for row in rows]))
    merged = [("first", "third"), ("lost",), ("second",), ("lost too",)]
    assert [source[i].captions() for i in range(len(source))] == merged
    content = pickle.dumps(source)
    assert len(content) < 1000
    for each in (source, pickle.loads(content)):
        assert (each[0].key, each[2].key, each[2].captions()) == ("b.png", "a.png", ("second",))
        assert reason_of(each, 1) == reason_of(each, 3) == "missing image"


def test_jsonl_rows_are_found_across_blank_lines(folder):
    rows = [{"image": f"{i}.png", "caption": f"n {i}" + "é" * i} for i in range(20)]
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    blank = text.replace("\n\n", "\r\n\n  \t \n\r\r\n", 3)
    (folder / "t.jsonl").write_text(blank, encoding="utf-8")
    source = TableSource(folder / "t.jsonl")
    assert [source[i].captions()[0] for i in range(len(source))] == [row["caption"] for row in rows]


def test_a_row_too_long_to_hold_breaks_alone_and_files_may_be_appended(folder, monkeypatch):
    monkeypatch.setattr("declip.data.sources.rows.LONGEST_ROW", 1000)
    quoted = 'b.png,"' + "long, " * 300 + '"'
    line, long_line = '{{"image": "{}.png", "caption": "x"}}', json.dumps({"image": "b.png" * 300})
    for kind, head, row, long in (
        ("csv", "image,caption\n", "{}.png,x", quoted),
        ("jsonl", "", line, long_line),
    ):
        text = f"\ufeff{head}{row.format('a')}\n{long}\n\ufeff{row.format('c')}\n"
        (folder / f"t.{kind}").write_text(text, encoding="utf-8")
        source = open_source(folder / f"t.{kind}")
        assert (source[0].key, source[2].key) == ("a.png", "c.png")
        assert reason_of(source, 1) == "unreadable row"


def test_the_authors_list_reads_as_it_is(folder, monkeypatch):
    about = {"url": "http://x"}
    lines = [{"filename": f"{name}.png", "caption": f"a {name}", **about} for name in "abc"]
    (folder / "lists").mkdir()
    (folder / "lists/yfcc15m.json").write_text("\n".join(json.dumps(line) for line in lines))
    source = open_source(folder / "lists/yfcc15m.json", Columns(root=folder))
    assert (len(source), source[2].key, source[2].captions()) == (3, "c.png", ("a c",))
    monkeypatch.chdir(folder.parent)
    rows = [(f"{folder}/a.png", "a"), (f"{folder.parent}/a.png", "b")]
    whole = open_source(write(folder / "absolute.csv", rows), Columns(root=folder.name))
    assert whole[0].captions() == ("a",)
    assert reason_of(whole, 1) == "path outside image root"
    for array in (json.dumps(lines), "[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n"):
        (folder / "array.json").write_text(array)
        refuses(r"is not JSONL.*jq -c '\.\[\]' array\.json", open_source, folder / "array.json")


def test_paths_of_windows(folder):
    (folder / "inner").mkdir()
    for name in ("inner/x.png", "y\\z.png"):
        shutil.copy(folder / "b.png", folder / name)
    names = "inner\\x.png", "y\\z.png", "in\\none.png"  # the second has a backslash in its name
    write(folder / "t.csv", [(name, "x") for name in names])
    for columns in (Columns(), Columns(root=folder)):
        source = open_source(folder / "t.csv", columns)
        assert (source[0].key, source[1].key) == names[:2]
        assert reason_of(source, 2) == "missing image"


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv"])
@pytest.mark.parametrize("large", [False, True])
def test_a_table_that_is_rewritten_in_place_stays_as_it_was_opened(
    folder, cache, monkeypatch, kind, large
):
    if large:
        monkeypatch.setattr("declip.data.sources.rows.LARGE_TABLE", 0)
    path = write(folder / f"t.{kind}", [(f"{n}.png", f"caption {n}") for n in range(5000)])
    source = open_source(path)
    write(path, [("a.png", "short")])
    assert [source[n].captions() for n in (0, 4999)] == [("caption 0",), ("caption 4999",)]
    assert open_source(path)[0].captions() == ("short",)


def test_csv_rows_of_the_wrong_length_are_broken_pairs(folder):
    (folder / "t.csv").write_text("image,caption\na.png,good\nb.png,one, two\nc.png\nb.png,fine\n")
    source = TableSource(folder / "t.csv")
    assert (len(source), source[3].captions()) == (4, ("fine",))
    assert reason_of(source, 1) == reason_of(source, 2) == "unreadable row"


@pytest.mark.parametrize(
    ("head", "rows", "place"),
    [
        ("image,caption", ["a.png,good", 'b.png,"lost', *["c.png,x"] * 9], "line 3 "),
        (
            "image,caption",
            ['a.png,"two\nlines"', 'b.png,"lost', 'c.png,said "so"', "b.png,x"],
            "line 4 ",
        ),
        ("image,caption", ['a.png,"lost', 'b.png,"there" she said'], "line 2 "),
        (
            "image,caption",
            ['a.png,"hello, you', "b.png,x", 'c.png,and so on"', "b.png,x"],
            "line 2 ",
        ),
        ("caption,image", ['"hello,a.png', 'and so on",b.png', "x,c.png"], "line 2 "),
    ],
)
def test_csv_whose_quote_would_swallow_rows(folder, head, rows, place):
    (folder / "t.csv").write_text("\n".join(["\ufeff" + head, *rows, ""]))
    assert place in message(folder / "t.csv")


@pytest.mark.parametrize("sign", [",", ";"])
@pytest.mark.parametrize(
    "cell",
    [
        '"a cat,\nblack, on a mat\nby b.png"',
        '"one\r\n\r\ntwo ""x"""',
        '5" wide',
        '"so" she said',
        '"x"',
    ],
)
def test_csv_quotes_that_swallow_nothing(folder, cell, sign):
    content = f'"image"{sign}"caption"\na.png{sign}{cell}\nb.png{sign}"y"\nc.png{sign}"z"'
    (folder / "t.csv").write_bytes(b"\xef\xbb\xbf" + content.encode())
    rows = list(csv.DictReader(io.StringIO(content, newline=""), delimiter=sign))
    source = TableSource(folder / "t.csv")
    for index, row in enumerate(rows):
        assert source[index].captions() == (" ".join(row["caption"].split()),)
    assert len(rows) == 3


def test_tsv_without_quotes_is_read_as_it_stands(folder):
    captions = [
        '"so" she said', '"lost', 'and "so" on"', '"all of it"', '"says ""it"" twice"', '5" wide', '"', '"x" and "y"',
        '"he said', 'she said"', '""empty" first', "good",
    ]  # fmt: skip
    expected = [*captions[:3], "all of it", 'says "it" twice', *captions[5:]]
    lines = [f"{caption}\t{i}.png" for i, caption in enumerate(captions)]
    (folder / "t.tsv").write_text("\n".join(["caption\timage", *lines]) + "\n")
    source = TableSource(folder / "t.tsv")
    found = [(source[i].key, source[i].captions()[0]) for i in range(len(source))]
    assert found == [(f"{i}.png", caption) for i, caption in enumerate(expected)]


def test_semicolons_and_tabs_are_read_and_utf_16_and_latin_1_get_a_hint(folder):
    for sign in ";\t":
        text = f"\ufeffimage{sign}caption\na.png{sign}x, y\n"
        (folder / "t.csv").write_text(text, encoding="utf-8")
        assert open_source(folder / "t.csv")[0].captions() == ("x, y",)
    (folder / "t.csv").write_text("image,caption\na.png,x\n", encoding="utf-16")
    assert "is UTF-16. Save it as UTF-8." in message(folder / "t.csv")
    text = "image,caption\na.png,café\nb\xe9.png,x\nc.png,good\n"
    (folder / "t.csv").write_bytes(text.encode("latin-1"))
    source = open_source(folder / "t.csv")
    assert [reason_of(source, place) for place in (0, 1)] == ["invalid text"] * 2
    assert source[2].captions() == ("good",)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_of_one_group_share_a_number(tmp_path, kind):
    rows = [(f"{n}.png", "a", group) for n, group in enumerate(("7", "other", "7", ""))]
    path = write(tmp_path / f"table.{kind}", rows, ("image", "caption", "product"))
    source = open_source(path, Columns(group="product"))
    found = [source.columns["group"][index] for index in range(4)]
    assert found[0] == found[2] != found[1]
    assert 0 not in found[:3]
    assert found[3] == 0
    assert "group" not in open_source(path).columns
    copied = pickle.loads(pickle.dumps(take(source, 2, 0)))
    for place, index in enumerate(copied.indices):
        assert copied.columns["group"][place] == found[index]
    other = open_source(path).other_columns()
    assert {name: numbers.tolist() for name, numbers in other.items()} == {"product": found}
    assert source.other_columns() == {}
    changed = open_source(path)
    write(path, rows[:2], ("image", "caption", "product"))
    assert changed.other_columns() == {}, "the file has other rows than when it was opened"
    write(path, rows, ("image", "caption", "product"))
    (row,) = (part := take(open_source(path), 1, 0)).indices
    assert part.other_columns()["product"].tolist() == [found[row]]
    assert "data.columns.group" in message(path, Columns(group="produkt"))


def content(folder, name):
    return (folder / f"{name}.png").read_bytes()


def pixel_of(source, index):
    return source[index].open().decoded().getpixel((0, 0))


def parquet(folder, images, captions):
    table = pa.table({"image": images, "caption": captions})
    pq.write_table(table, folder / "t.parquet", row_group_size=2)
    return TableSource(folder / "t.parquet")


def test_parquet_bytes_and_lists_of_captions(folder):
    images = pa.array([content(folder, "a"), None, b"", content(folder, "c")], pa.binary())
    source = parquet(folder, images, [["x", "y "], ["z"], ["w"], []])
    assert (source[0].key, source[0].captions()) == ("row 0", ("x", "y"))
    assert reason_of(source, 1) == reason_of(source, 2) == "missing image"
    assert reason_of(source, 3) == "empty caption"
    # --- other types of bytes
    files = [content(folder, name) for name in "aba"]
    size = max(map(len, files))
    fixed = pa.array([file.ljust(size, b"\0") for file in files], pa.binary(size))
    for images in (fixed, pa.array(files, pa.binary()).dictionary_encode()):
        source = parquet(folder, images, ["x", "y", "x"])
        assert (source[1].key, source[1].captions()) == ("row 1", ("y",))
        assert pixel_of(source, 1) == (1, 1, 1)


def test_parquet_structs_of_bytes_and_path(folder):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        {"bytes": content(folder, "b"), "path": "lost.png"},
        {"bytes": None, "path": "c.png"},
        None,
    ]
    source = parquet(folder, pa.array(rows, kind), ["x", "y", "z"])
    assert pixel_of(source, 0) == (1, 1, 1)
    assert pixel_of(source, 1) == (2, 2, 2)
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
        assert (source[0].captions(), reason_of(source, 1)) == (("x",), reason)


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
        assert [again[i].captions()[:2] for i in range(3)] == [
            (f"said {i}", f"said {i + 3}") for i in range(3)
        ]
        assert again[2].key == "c.png"
    stamps = [file.stat().st_mtime_ns for file in made]
    assert [file.stat().st_mtime_ns for file in made] == stamps
    for file in made:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert TableSource(path)[1].captions()[0] == "said 1"
    write(path, rows[1:])
    assert TableSource(path)[0].captions()[0] == "said 1"


@pytest.fixture
def parts(folder):
    """A folder of two files, whose bytes are images; the first image is in both."""
    made = folder / "parts"
    made.mkdir()
    (made / "._train-0.parquet").write_bytes(b"of macOS")
    a, b, c = (content(folder, name) for name in "abc")
    pq.write_table(
        pa.table({"image": [a, b], "text": ["x", "y"], "label": [0, 1]}), made / "train-0.parquet"
    )
    pq.write_table(
        pa.table({"image": [b"", c, a], "text": ["w", "z", "v"], "label": [0, 0, 0]}),
        made / "train-1.parquet",
    )
    return made


@pytest.mark.parametrize("large", [0, 1 << 30])
@pytest.mark.parametrize("name", ["", "/*.parquet", "/train-{0..1}.parquet"])
@pytest.mark.usefixtures("cache")
def test_a_folder_or_a_pattern_is_one_table(parts, name, large, monkeypatch):
    monkeypatch.setattr(table_rows, "LARGE_TABLE", large)
    source = open_source(f"{parts}{name}")
    assert [source[n].key for n in range(len(source))] == [f"row {n}" for n in range(4)]
    assert source[0].captions() == ("x", "v")
    assert reason_of(source, 2) == "missing image"
    assert source[3].open().decoded().getpixel((0, 0)) == (2, 2, 2)
    assert pickle.loads(pickle.dumps(source))[3].captions() == ("z",)


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
    write(
        folder / f"metadata.{kind}",
        [("a.png", "/x", "red"), ("b.png", "/y", "blue")],
        ("file_name", "path", "text"),
    )
    source = open_source(folder)
    assert [source[n].key for n in range(len(source))] == ["a.png", "b.png"]
    assert (source[1].captions(), source[1].open().decoded().getpixel((0, 0))) == (
        ("blue",),
        (1, 1, 1),
    )
