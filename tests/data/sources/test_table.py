"""Tables of pairs: paths, columns, broken rows, and what JSONL and CSV may hold."""

import csv
import io
import json
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data.tables import KINDS, message, reason_of, write
from declip.data.pair import BrokenPair
from declip.data.sources.open import open_source
from declip.data.sources.subset import take
from declip.data.sources.table import IMAGE_NAMES, TableSource, find_column
from declip.errors import UserError


@pytest.fixture
def folder(three_pictures):
    return three_pictures


@pytest.mark.parametrize("kind", KINDS)
def test_one_bad_row_leaves_the_others(folder, kind):
    (folder / "text.jpg").write_text("I am text")
    rows = [("a.png", "x" * 100_000), ("none.png", "gone"), ("text.jpg", "words"), ("b.png", " "), ("", "no path")]
    source = TableSource(write(folder / f"t.{kind}", [*rows, ("c.png", "good")]))
    found = {}
    for index in range(len(source)):
        try:
            pair = source[index]
            found[pair.key] = pair.captions
        except BrokenPair as broken:
            found[broken.key] = broken.reason
    place = {"jsonl": "line 5", "csv": "row 6", "tsv": "row 6", "parquet": "row 4"}[kind]
    assert found == {
        "a.png": "caption too long",
        "none.png": "missing image",
        "text.jpg": "unreadable image",
        "b.png": "empty caption",
        place: "missing image",
        "c.png": ("good",),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_column_is_named_with_what_is_there(folder, kind):
    told = message(write(folder / f"t.{kind}", [("a.png", "x")]), caption_column="captoin")
    assert "has no column 'captoin' for the caption. Did you mean 'caption'?" in told
    assert "Its columns: 'image', 'caption'. Name the right one with caption_column." in told


@pytest.mark.parametrize(
    ("columns", "given", "found"),
    [
        (["caption", "image"], "image", "image"),
        (["url", "FilePath", "title"], "image", "FilePath"),
        (["filename", "image_path"], "image", "image_path"),
        (["Image ", "caption"], "image", "Image "),
        (["path", "picture"], "picture", "picture"),
        (["picture", "p"], "image", None),
        (["picture", "path"], "filename", None),
    ],
)
def test_usual_names_are_found_where_no_other_is_given(columns, given, found):
    if found is None:
        with pytest.raises(UserError, match=f"no column '{given}'"):
            find_column(columns, given, IMAGE_NAMES, "image", Path("t.csv"))
    else:
        assert find_column(columns, given, IMAGE_NAMES, "image", Path("t.csv")) == found


@pytest.mark.parametrize("kind", KINDS)
def test_tables_with_nothing_in_them(folder, kind):
    path = folder / f"t.{kind}"
    path.touch()
    told = message(path)
    assert "is empty" in told or "no rows" in told or "is not a Parquet file" in told
    write(path, [])
    told = message(path)
    assert "no rows" in told or "is empty" in told or "holds null" in told


def test_tables_that_are_not_there_or_no_tables(folder):
    assert "no file or folder" in message(folder / "none.csv")
    with pytest.raises(UserError, match="There is no table"):
        TableSource(folder / "none.csv")
    assert "no folder" in message(write(folder / "t.csv", [("a.png", "x")]), image_root=folder / "none")
    (folder / "t.jsonl").write_text('[\n{"image": "a.png"}\n]\n')
    assert TableSource(folder / "t.jsonl", caption_column="image").captions(1) == ("a.png",)
    (folder / "t.jsonl").write_text('[{"image": "a.png", "caption": "x"}]\n')
    assert "is not JSONL, a JSON object on each line: unreadable row: line 1" in message(folder / "t.jsonl")
    (folder / "t.parquet").write_text("image,caption\n")
    assert "is not a Parquet file" in message(folder / "t.parquet")
    (folder / "t.csv").write_text("image,caption\na.png,x\n", encoding="utf-16")
    assert "is UTF-16. Save it as UTF-8." in message(folder / "t.csv")
    (folder / "t.csv").write_text("a.png,a cat\n")
    assert "Its columns: 'a.png', 'a cat'" in message(folder / "t.csv")


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_one_image_are_one_pair(folder, kind):
    rows = ["b.png|first", "|lost", "a.png|second", "b.png|third", "b.png|first", "a.png| ", "|lost too"]
    source = TableSource(write(folder / f"t.{kind}", [tuple(row.split("|")) for row in rows]))
    assert [source.captions(i) for i in range(len(source))] == [
        ("first", "third"),
        ("lost",),
        ("second",),
        ("lost too",),
    ]
    assert [source.key(0), source[2].key] == ["b.png", "a.png"]
    assert source[2].image.getpixel((0, 0)) == (0, 0, 0)
    assert pickle.loads(pickle.dumps(source))[2].captions == ("second",)
    assert len(pickle.dumps(source)) < 1000
    assert reason_of(source, 1) == reason_of(source, 3) == "missing image"


def test_many_tables_are_refused_by_the_way_to_name_them(folder):
    (folder / "set/data").mkdir(parents=True)
    for number in range(2):
        write(folder / f"set/data/{number}.csv", [("a.png", "x")])
    words = (f"{folder}/set", f"{folder}/set/data/*.csv", "https://example.org/0.parquet")
    assert all("data.source=[" in message(word) for word in words)


# JSONL


def test_jsonl_rows_are_found_across_blank_lines(folder):
    rows = [{"image": f"{i}.png", "caption": f"n {i}" + "é" * i} for i in range(20)]
    text = "\ufeff" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / "t.jsonl").write_text(text.replace("\n\n", "\r\n\n  \t \n\r\r\n", 3), encoding="utf-8")
    source = TableSource(folder / "t.jsonl")
    assert len(source) == 20
    assert [source.captions(i)[0] for i in range(20)] == [f"n {i}" + "é" * i for i in range(20)]


def test_the_authors_list_reads_as_it_is(folder):
    lines = [{"filename": f"{name}.png", "caption": f"a {name}", "url": "http://x"} for name in "abc"]
    (folder / "lists").mkdir()
    (folder / "lists/yfcc15m.json").write_text("\n".join(json.dumps(line) for line in lines))
    source = open_source(folder / "lists/yfcc15m.json", image_root=folder)
    with pytest.raises(IndexError):
        source[3]
    assert (len(source), source[2].key, source[2].captions) == (3, "c.png", ("a c",))
    (folder / "array.json").write_text(json.dumps(lines))
    assert re.search(r"is not JSONL.*jq -c '\.\[\]' array\.json > rows\.jsonl", message(folder / "array.json"))


# CSV, TSV


def test_csv_quotes_line_ends_and_a_byte_order_mark(folder):
    text = '\ufeff"caption",size,image\r\n"a ""big"", old\ncat",3,a.png\r\nplain,4,b.png\r\n'
    (folder / "t.csv").write_bytes(text.encode())
    source = TableSource(folder / "t.csv")
    assert source[0].captions == ('a "big", old cat',)
    assert source[1].captions == ("plain",)


def test_csv_rows_of_the_wrong_length_are_broken_pairs(folder):
    (folder / "t.csv").write_text("image,caption\na.png,good\nb.png,one, two\nc.png\nb.png,fine\n")
    source = TableSource(folder / "t.csv")
    assert len(source) == 4
    assert source[1].captions == ("fine",)
    assert reason_of(source, 2) == reason_of(source, 3) == "unreadable row"
    with pytest.raises(BrokenPair, match=r"row 3 \(3 cells instead of 2\)"):
        source[2]


@pytest.mark.parametrize(
    ("head", "rows", "place"),
    [
        ("image,caption", ["a.png,good", 'b.png,"lost', *["c.png,x"] * 9], "row 3 "),
        ("image,caption", ['a.png,"two\nlines"', 'b.png,"lost', 'c.png,said "so"', "b.png,x"], "row 3 "),
        ("image,caption", ['a.png,"lost', 'b.png,"there" she said'], "row 2 "),
        ("image,caption", ['a.png,"hello, you', "b.png,x", 'c.png,and so on"', "b.png,x"], "row 2 "),
        ("caption,image", ['"hello,a.png', 'and so on",b.png', "x,c.png"], "row 2 "),
    ],
)
def test_csv_whose_quote_would_swallow_rows(folder, head, rows, place):
    (folder / "t.csv").write_text("\n".join(["\ufeff" + head, *rows, ""]))
    assert place in message(folder / "t.csv")


@pytest.mark.parametrize(
    "cell", ['"a cat,\nblack, on a mat\nby b.png"', '"one\r\n\r\ntwo ""x"""', '5" wide', '"so" she said', '"x"', '""']
)
def test_csv_quotes_that_swallow_nothing(folder, cell):
    content = f'\ufeff"image","caption"\na.png,{cell}\nb.png,"y"\nc.png,"z"'
    (folder / "t.csv").write_bytes(content.encode())
    rows = list(csv.reader(io.StringIO(content.removeprefix("\ufeff"), newline="")))[1:]
    source = TableSource(folder / "t.csv")
    assert [source[i].captions if i or cell != '""' else ("",) for i in range(3)] == [
        (" ".join(caption.split()),) for _, caption in rows
    ]


def test_tsv_without_quotes_is_read_as_it_stands(folder):
    captions = [
        '"so" she said', '"lost', 'and "so" on"', '"all of it"', '"says ""it"" twice"', '5" wide', '"', '"x" and "y"',
        '"he said', 'she said"', '""empty" first', '"two\nlines"', "good",
    ]  # fmt: skip
    expected = [*captions[:3], "all of it", 'says "it" twice', *captions[5:11], "two lines", "good"]
    text = "caption\timage\n" + "".join(f"{caption}\t{i}.png\n" for i, caption in enumerate(captions))
    (folder / "t.tsv").write_text(text)
    source = TableSource(folder / "t.tsv")
    assert [source.captions(i) for i in range(len(source))] == [(caption,) for caption in expected]
    assert [source.key(i) for i in range(len(source))] == [f"{i}.png" for i in range(len(captions))]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_two_columns_of_one_name(folder, kind):
    columns = ["image", "caption", "caption"]
    table = pa.Table.from_arrays([pa.array(["a.png"])] * 3, names=columns)
    if kind == "csv":
        (folder / "t.csv").write_text("image,caption,caption\na.png,x,y\n")
    else:
        pq.write_table(table, folder / "t.parquet")
    assert "2 columns named 'caption'" in message(folder / f"t.{kind}")
    pq.write_table(table.rename_columns(["image", "x", "x"]).append_column("caption", [["x"]]), folder / "t.parquet")
    assert TableSource(folder / "t.parquet")[0].captions == ("x",)


# Keywords, hints, home


@pytest.mark.parametrize("kind", KINDS)
def test_keywords_are_read_from_their_column(folder, kind):
    rows = [("a.png", "one", "red; round,old"), ("b.png", "two", ""), ("a.png", "more", "old ,  very  wet")]
    path = write(folder / f"t.{kind}", rows, ("image", "caption", "Keywords"))
    source = open_source(path)
    assert [source[i].keywords for i in range(2)] == [("red", "round", "old", "very wet"), ()]
    assert source.read_lazy(0).keywords == ("red", "round", "old", "very wet")
    assert pickle.loads(pickle.dumps(source))[0].keywords == source[0].keywords
    assert open_source(path, keyword_column="caption")[1].keywords == ("two",)
    told = message(path, keyword_column="tags")
    assert "'tags'" in told
    assert "data.keyword_column" in told


def test_keywords_may_be_lists(folder):
    rows = [{"image": "a.png", "caption": "x", "keywords": ["red", "a, b", 5, " ", "red"]}]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"image": "b.png", "caption": "y"}])))
    source = open_source(folder / "t.jsonl")
    assert [source[i].keywords for i in range(2)] == [("red", "a, b"), ()]
    pq.write_table(
        pa.table({"image": ["a.png"], "caption": ["x"], "keywords": [["red", "round"]]}), folder / "t.parquet"
    )
    assert open_source(folder / "t.parquet")[0].keywords == ("red", "round")


def test_semicolons_and_latin_1_get_a_hint(folder):
    (folder / "t.csv").write_text("image;caption\na.png;x\n")
    assert "semicolons" in message(folder / "t.csv")
    (folder / "t.csv").write_bytes("image,caption\na.png,café\nb\xe9.png,x\nc.png,good\n".encode("latin-1"))
    for place in (0, 1):
        with pytest.raises(BrokenPair, match=r"invalid text.*iconv -f latin1"):
            open_source(folder / "t.csv")[place]
    assert open_source(folder / "t.csv")[2].captions == ("good",)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_rows_of_one_group_share_a_number(tmp_path, kind):
    path, groups = tmp_path / f"table.{kind}", ["7", "other", "7", ""]
    rows = [{"image": f"{n}.png", "caption": "a", "product": group} for n, group in enumerate(groups)]
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        path.write_text("\n".join(["image,caption,product", *(",".join(row.values()) for row in rows)]))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    source = open_source(path, group_column="product")
    found = [source.group(index) for index in range(4)]
    assert 0 not in found[:3]
    assert [found[0] == found[2], found[0] == found[1], found[3]] == [True, False, 0]
    copied = pickle.loads(pickle.dumps(take(source, 2, 0)))
    assert [copied.group(0), copied.group(1)] == [found[index] for index in take(source, 2, 0).indices]
    assert open_source(path).group(0) == 0
    assert "data.group_column" in message(path, group_column="produkt")
