"""Images, tables and folders that came from elsewhere: memory stays bounded, nothing runs or hangs, and all is said."""

import json
import os
import pickle
import struct
import zlib
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import declip
from data.fakes import read, write
from declip.data.columns import Columns
from declip.data.images.decode import decode
from declip.data.sources.open import open_source
from declip.evaluation.datasets import open_dataset
from declip.recipe.load import load_recipe
from end_to_end.conftest import png
from hostile import ROOM, Trap, apart, quickly, said, written

pytestmark = pytest.mark.usefixtures("here")


def large_jpeg():
    content = written("JPEG")
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", 65_500, 65_500) + content[place + 4 :]


def tiff(side):
    tags = [
        (256, side),
        (257, side),
        (258, 8),
        (259, 1),
        (262, 1),
        (273, 8),
        (277, 1),
        (278, side),
        (279, 100),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


BOMB, PIXELS = zlib.compress(bytes(64 << 20), 1), zlib.compress(bytes(14))
IMAGES = {
    "50 gigapixels, PNG": (
        png(223_607, 223_607, (b"IDAT", zlib.compress(bytes(99)))),
        "image too large",
    ),
    "4 gigapixels, JPEG": (large_jpeg(), "image too large"),
    "1,000 gigapixels, TIFF": (tiff(1_000_000), "image too large"),
    "comment that inflates, PNG": (
        png(2, 2, (b"zTXt", b"x\0\0" + BOMB), (b"IDAT", PIXELS)),
        "unreadable image",
    ),
    "pixels that inflate, PNG": (png(2, 2, (b"IDAT", BOMB)), "read"),
    "profile that inflates, PNG": (
        png(2, 2, (b"iCCP", b"x\0\0" + BOMB), (b"IDAT", PIXELS)),
        "unreadable image",
    ),
    "EPS": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(harm) (w) file\n%%EOF\n",
        "unreadable image",
    ),
    "PPM": (written("PPM"), "unreadable image"),
    "pickle": (pickle.dumps(Trap(Path("harm"))), "unreadable image"),
    "nothing": (b"", "truncated image"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_are_bombs_or_none(name):
    content, expected = IMAGES[name]
    Path("a.jpg").write_bytes(content)
    for source in (Path("a.jpg"), content):
        got, megabytes = apart(lambda source=source: decode(source, "a.jpg"))
        assert (got, megabytes < ROOM) == (expected, True)
    assert not Path("harm").exists()


def test_a_file_of_20_gigabytes_is_not_read():
    Path("a.webp").write_bytes(b"RIFF\xff\xff\xff\xffWEBPVP8X")
    os.truncate("a.webp", 20 << 30)  # takes no room on the disk
    got, megabytes = apart(lambda: decode(Path("a.webp"), "a.webp"))
    assert (got, megabytes < ROOM) == ("image too large", True)


OTHER_THINGS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", OTHER_THINGS)
def test_what_is_no_file_does_not_hang(name, here, monkeypatch):
    monkeypatch.setattr("declip.data.sources.shard_files.PAUSE", 0.0)
    files = "a.jpg set/b.txt set/c.jpg t.csv l.pairs w.pth r.yaml p/a.parquet s/a.tar"
    for place in files.split():
        (here / place).parent.mkdir(exist_ok=True)
        OTHER_THINGS[name](here / place)
    Image.new("RGB", (4, 4)).save("set/b.png")
    reason = "missing image" if name.startswith("link") else "unreadable image"
    reads = [partial(decode, Path("a.jpg"), "a.jpg")]
    expected = [reason]
    places = range(len(open_source("set")))
    for place, missing in zip(places, ("missing caption", reason), strict=False):
        reads.append(lambda place=place: read(open_source("set"), place))
        expected.append(missing)
    sources = [partial(open_source, spec) for spec in ("t.csv", "l.pairs", "p", "s")]
    refused = [*sources, lambda: declip.load("w.pth"), lambda: load_recipe("r.yaml")]
    got = apart(lambda: [*map(said, (*reads, *refused))], answer=lambda work: work())[0]
    assert got[: len(reads)] == expected
    assert not {"read", ""} & {*got[len(reads) :]}


@quickly
@given(
    st.binary(max_size=200),
    st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]),
    st.integers(0, 80),
)
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_as_an_image(content, kind, kept):
    said(lambda: decode(written(kind)[:kept] + content, "k"))


def table(kind, rows):
    return write(Path(f"t.{kind}"), [tuple(row.values()) for row in rows], tuple(rows[0]))


def read_all(source):
    return [said(lambda i=i: read(source, i)) for i in range(min(len(source), 40))]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_an_image_root_cannot_be_left(kind, here):
    root = here / "images"
    (root / "inner").mkdir(parents=True)
    for place in (root / "in.png", here / "out.png", here.parent / "up.png"):
        Image.new("RGB", (2, 2)).save(place)
    (root / "good").symlink_to(root / "in.png")
    (root / "file.png").symlink_to(here / "out.png")
    (root / "folder").symlink_to(here.parent)
    (root / "chain.png").symlink_to(root / "file.png")
    outside = ["../out.png", "inner/../../out.png", str(here / "out.png"), "/etc/passwd"]
    outside += ["file.png", "chain.png", "folder/up.png"]
    strange = "~/in.png", "file:///etc/passwd", "https://example.org/a.png"
    expected = dict.fromkeys(("in.png", "good", "inner/../in.png"), "read")
    expected |= dict.fromkeys(outside, "path outside image root")
    expected |= dict.fromkeys(strange, "missing image")
    path = table(kind, [{"image": name, "caption": "x"} for name in expected])
    source = open_source(path, Columns(root=root))
    assert dict(zip(expected, read_all(source), strict=True)) == expected


CELLS = [
    ("NaN", '"x"', "missing image"),
    ("1" * 5000, '"x"', "unreadable row"),
    ('["a.png"]', '"x"', "missing image"),
    ('"\\u0000.png"', '"x"', "missing image"),
    ('"\\ud800.png"', '"x"', "invalid text"),
    (json.dumps("a" * 5000), '"x"', "missing image"),
    ('"a.png"', "NaN", "unreadable row"),
    ('"a.png"', "null", "empty caption"),
    ('"a.png"', "[" * 60 + '"x"' + "]" * 60, "unreadable row"),
    ('"a.png"', '{"en": "x"}', "unreadable row"),
    ('"a.png"', "[" * 100_000, "unreadable row"),
    ('"a.png"', '"\\u001b[2J\\u0007\\u009b"', "read"),
    ('"a.png"', '"\\u0001\\u0002\\u007f\\u0085"', "empty caption"),
    ('"a.png"', '"\\ud83d"', "invalid text"),
    ('"a.png"', json.dumps("x" * 10_000_000), "caption too long"),
    ('"a.png"', json.dumps(["x"] * 1_000_000), "too many captions"),
    ('"a.png"', json.dumps("x" * 20_000_000), "unreadable row"),
]


def test_cells_that_hold_anything():
    Image.new("RGB", (2, 2)).save("a.png")
    # Each row has a path of its own, so that none is merged with another.
    images = [image.replace('"a.png"', f'"{"./" * i}a.png"') for i, (image, *_) in enumerate(CELLS)]
    rows = [f'{{"image": {image}, "caption": {CELLS[i][1]}}}' for i, image in enumerate(images)]
    Path("t.jsonl").write_text("\n".join(rows))
    source = open_source("t.jsonl")
    assert read_all(source) == [expected for *_, expected in CELLS]
    assert apart(lambda: read_all(source))[1] < 4 * ROOM
    control = [caption for _, caption, _ in CELLS].index('"\\u001b[2J\\u0007\\u009b"')
    assert source[control].captions() == ("[2J",), "nothing that a terminal obeys is left"


def test_a_row_that_does_not_end_takes_no_memory():
    Image.new("RGB", (2, 2)).save("a.png")
    with open("t.jsonl", "wb") as file:
        file.write(b'{"image": "a.png", "caption": "x"}\n{"image": "a.png", "caption": "')
        file.write(b"y" * (24 << 20))
    # The mapped file counts as memory, which the system takes back at will.
    got, megabytes = apart(lambda: read(open_source("t.jsonl"), 1))
    assert (got, megabytes < 2 * 24 + ROOM) == ("unreadable row", True)
    for kind, mark in (("csv", b","), ("tsv", b"\t")):
        Path(f"t.{kind}").write_bytes(b"image" + mark + b'caption\na.png\t"' + b"y" * (24 << 20))
        got, megabytes = apart(lambda kind=kind: read(open_source(f"t.{kind}"), 0))
        assert (got, megabytes < 3 * 24 + ROOM) == ("unreadable row", True)
    Path("h.csv").write_bytes(b"x" * (10 << 20))
    assert "no column 'image'" in said(lambda: open_source("h.csv"))


def test_names_that_are_no_text(here):
    for name in (b"set/one/\xff\x1b.png", b"set/two/b.png"):
        os.makedirs(os.path.dirname(name), exist_ok=True)
        with open(name, "wb") as file:
            file.write(written("PNG"))
    with open(b"set/one/\xff\x1b.txt", "w") as file:
        file.write("a red square")
    for source in (open_source("set"), open_dataset("folder:set").split("test")):
        assert (source[0].open().size, source[0].key[-6:]) == ((16, 16), "\ufffd\x1b.png")
    os.rename("set/two", b"set/\xff")
    assert "name is not UTF-8" in said(lambda: open_dataset("folder:set"))


def test_parquet_that_would_run_code(here):
    """Arrow before 14.0.1 unpickled a type that a file names (CVE-2023-47248)."""
    trap = pickle.dumps(Trap(here / "harm"))
    about = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": trap}
    image = pa.field("image", pa.binary(), metadata=about)
    kind = pa.schema([image, pa.field("caption", pa.string())])
    cells = [trap, b"\x93NUMPY\1\0", b"", None]
    pq.write_table(pa.table([cells, ["x"] * 4], schema=kind), "t.parquet")
    source = open_source("t.parquet")
    assert read_all(source) == ["unreadable image"] * 2 + ["missing image"] * 2
    assert not Path("harm").exists()


def test_parquet_that_repeats_one_caption(monkeypatch):
    """A few kilobytes that stand for half a gigabyte, and could stand for a thousand."""
    monkeypatch.setattr("declip.data.sources.rows.MOST_IN_PARQUET", 64 << 20)
    caption = pa.DictionaryArray.from_arrays(pa.array([0] * 8000, pa.int32()), ["x" * (1 << 16)])
    repeated = pa.table({"image": ["a"] * 8000, "caption": caption})
    pq.write_table(repeated, "t.parquet", store_schema=False)
    assert Path("t.parquet").stat().st_size < 4000
    got, megabytes = apart(lambda: open_source("t.parquet"))
    assert ("take more than 67,108,864 bytes" in got, megabytes < 4 * ROOM) == (True, True)


def test_every_flipped_bit_in_parquet():
    path = table("parquet", [{"image": "a.png", "caption": "x"}] * 2)
    content = path.read_bytes()
    for place in range(0, len(content), 2):
        flipped = bytes([content[place] ^ 1 << place // 2 % 8])
        path.write_bytes(content[:place] + flipped + content[place + 1 :])
        said(lambda: read_all(open_source("t.parquet")))


PIECES = [
    *(
        b"image",
        b"caption",
        b"label",
        b"{",
        b"}",
        b"[",
        b"]",
        b":",
        b"1e999",
        b"NaN",
        b"null",
        b"../x",
        b"/dev/zero",
    ),
    *(
        b",",
        b"\t",
        b"\n",
        b"\r",
        b'"',
        b"\0",
        b"\xff",
        b"\\ud800",
        b"\xef\xbb\xbf",
        b'"image"',
        b'"caption": ',
    ),
    *(b"image,caption\n", b"image\tcaption\tlabel\n", b'{"image": "a.png", "caption": "x"}\n'),
]


@quickly
@given(st.lists(st.sampled_from(PIECES)).map(b"".join), st.sampled_from(["jsonl", "csv", "tsv"]))
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_any_bytes_as_a_table(content, kind):
    path = Path(f"any.{kind}")
    path.write_bytes(content)
    said(lambda: read_all(open_source(path)))
    said(lambda: read_all(open_dataset(str(path)).split("test")))


def test_folders_that_link_to_each_other_end(here):
    for name in ("set/cat/deep", "set/dog"):
        (here / name).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(here / name / "a.png")
    for place in ("set/cat/deep/x", "set/cat/deep/y", "set/cat/z"):
        (here / place).symlink_to(here / "set/cat")
    got, _ = apart(lambda: open_dataset("folder:set").split("test"))
    assert got == "read"
    assert len(open_dataset("folder:set").split("test")) == 2
