"""Pairs from tar shards: names, the index, members against tarfile, damaged archives and those that lie."""

import io
import json
import os
import pickle
import random
import re
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from data.fakes import SIZES, message, pair, picture, reason_of, write_shards, write_tar
from declip.data.sources import shards
from declip.data.sources.names import absolute
from declip.data.sources.open import open_source
from declip.data.sources.shard_files import OPEN_FILES, OpenFile, open_local
from declip.data.sources.shards import ShardSource, members

pytestmark = pytest.mark.usefixtures("cache")


def one(tmp_path, members):
    return ShardSource(str(write_tar(tmp_path / "one.tar", members)))


def add_links(path, name, *kinds, format=tarfile.PAX_FORMAT):
    """Append members that are no files: a link, and others of some kinds."""
    with tarfile.open(path, "a", format=format) as tar:
        for kind in (tarfile.SYMTYPE, *kinds):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 4096
            tar.addfile(info)


def test_pairs_are_those_that_were_written(shard_folder):
    source = open_source(shard_folder)
    assert (len(source), source.shards().tolist(), source.remote) == (21, list(SIZES), False)
    for each in (source, pickle.loads(pickle.dumps(source))):
        read = [(each[i].open().decoded().getpixel((0, 0)), each[i].captions()) for i in range(21)]
        assert read == [((number, 0, 7), (f"picture {number}",)) for number in range(21)]
    assert source[6].key == "00002.tar/000000006"
    assert len(pickle.dumps(source)) < 300
    with pytest.raises(IndexError):
        source[21]


def test_what_names_shards_and_which_are_missing(shard_folder):
    (shard_folder / "._00000.tar").write_bytes(b"of macOS")
    for word, sizes in (
        ("{0}/0000[02].tar", [5, 9]),
        ("{0}/{{00003..00001}}.tar", [6, 9, 1]),
        ("{0}/000{{,}}{{02..03}}.tar", [9, 6, 9, 6]),
        ("{0}/0000{{3,0,1}}.tar", [6, 5, 1]),
    ):
        assert open_source(word.format(shard_folder)).shards().tolist() == sizes
    assert (absolute("~/x/*.tar"), absolute("memory://a.tar")) == (
        f"{Path.home()}/x/*.tar",
        "memory://a.tar",
    )
    for word, missing in (
        ("{00002..00012}.tar", "00004.tar"),
        ("x.tar", "x.tar"),
        ("x{8..11}.tar", "x8.tar"),
        ("x*.tar", "x*.tar"),
    ):
        assert f"'{shard_folder}/{missing}' does not exist" in message(f"{shard_folder}/{word}")
    assert "names more than 1,000,000 shards" in message("{0..9999999999999}.tar")


def test_captions_of_text_and_json(tmp_path):
    cases = [  # text, JSON, captions or reason
        (b"\xef\xbb\xbftwo\nlines", None, ("two lines",)),
        (None, {"caption": "of json"}, ("of json",)),
        (b"same", {"caption": "same", "text": "not read"}, ("same",)),
        (b"first", {"captions": ["second", None, "third"]}, ("first", "second", "third")),
        (None, {"caption": None, "text": "of text"}, ("of text",)),
        (None, None, "missing caption"),
        (None, {"url": "http://x"}, "missing caption"),
        (b" \n", None, "empty caption"),
        (None, {"caption": 3}, "unreadable JSON"),
        (None, [1], "unreadable JSON"),
        (b"\xff", None, "invalid text"),
    ]
    members = [(f"x{number}.JPG", picture(1, "jpeg")) for number in range(len(cases))]
    members += [
        (f"x{number}.txt", text) for number, (text, *_) in enumerate(cases) if text is not None
    ]
    members += [
        (f"x{n}.json", json.dumps(said).encode())
        for n, (_, said, _) in enumerate(cases)
        if said is not None
    ]
    members += [
        ("l.txt", b"no image"),
        ("m.jpg", b"no image"),
        ("m.txt", b"not an image"),
        ("n.png", picture(1)),
    ]
    members += [
        ("n.json", b"[" * 9999),
        ("readme.md", b"no pair"),
        ("noending", b"no pair"),
        (".jpg", b"no key"),
    ]
    source = one(
        tmp_path, [*members, ("__MACOSX/._a.jpg", b"no key"), ("a.seg.png", b"no part of a pair")]
    )
    found = [
        reason_of(source, i) if i in range(5, 14) else source[i].captions()
        for i in range(len(source))
    ]
    assert found == [
        *(expected for *_, expected in cases),
        "missing image",
        "unreadable image",
        "unreadable JSON",
    ]


def test_a_key_may_lie_in_pieces_and_come_again(tmp_path):
    members = [(f"in/{n}.png", picture(n)) for n in range(3)] + [
        (f"in/{n}.txt", b"%d" % n) for n in range(3)
    ]
    members += [("in/1.png", picture(9)), ("in/1.txt", b"again"), ("in/2.webp", picture(8))]
    source = one(tmp_path, members)
    assert [source[i].captions()[0] for i in range(len(source))] == ["0", "1", "2", "again"]
    assert source[3].open().decoded().getpixel((0, 0)) == (9, 0, 7)
    assert source[1].key == source[3].key == "one.tar/in/1"


def test_names_that_would_leave_a_folder_are_only_names(tmp_path):
    keys = {"link": b"of a link", "../x": b"up", "/y": b"root", "long/" * 60 + "z": b"long"}
    members = [(f"{key}.txt", text) for key, text in keys.items()] + [
        (f"{key}.png", picture(1)) for key in [*keys][1:]
    ]
    add_links(write_tar(tmp_path / "t.tar", members, tarfile.PAX_FORMAT), "link.png")
    before = {*tmp_path.rglob("*")}
    source = ShardSource(str(tmp_path / "t.tar"))
    assert reason_of(source, 0) == "missing image"
    assert [source[i].captions()[0] for i in (1, 2, 3)] == ["up", "root", "long"]
    assert all(path.is_relative_to(tmp_path / "cache") for path in {*tmp_path.rglob("*")} - before)


def test_shards_cut_short_and_other_files_are_refused_and_one_cut_later_breaks_its_pairs(
    shard_folder, tmp_path
):
    source = ShardSource(str(shard_folder))
    with tarfile.open(shard_folder / "00002.tar") as tar:
        os.truncate(shard_folder / "00002.tar", tar.getmember("000000010.txt").offset_data + 3)
    assert (source[9].captions(), reason_of(source, 10)) == (("picture 9",), "truncated shard")
    assert re.search(
        r"00002.tar' .* beyond its first 5 pairs: cut short", message(str(shard_folder))
    )
    for content in (b"\x1f\x8b" + bytes(600), b"<html>" * 200, b"", b"abc"):
        (tmp_path / "t.tar").write_bytes(content)
        assert "decompress" in message(str(tmp_path / "t.tar"))
    (tmp_path / "t.tar").write_bytes(bytes(1024))
    assert "no pair: KEY.jpg" in message(str(tmp_path / "t.tar"))


def test_members_of_absurd_size_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LARGEST_IMAGE", 500)
    monkeypatch.setattr(shards, "LARGEST_TEXT", 30)
    members = [("a.png", bytes(501)), ("a.txt", b"x"), ("b.png", picture(1)), ("b.txt", b"x" * 31)]
    source = one(
        tmp_path, [*members, ("c.png", picture(1)), ("c.json", b'{"caption": "x"}'.ljust(31))]
    )
    assert [reason_of(source, i) for i in range(3)] == [
        "image too large",
        "caption too long",
        "caption too long",
    ]


def test_the_index_is_made_once_for_each_state_of_a_shard(shard_folder, monkeypatch):
    ShardSource(str(shard_folder))
    made, make_index = [], shards.make_index
    monkeypatch.setattr(
        shards, "make_index", lambda *given: made.append(given[1]) or make_index(*given)
    )
    assert len(ShardSource(f"{shard_folder}/*.tar")) == 21
    assert made == []
    write_tar(shard_folder / "00001.tar", [*pair(30), *pair(31)])
    assert len(ShardSource(str(shard_folder))) == 22
    assert made == [str(shard_folder / "00001.tar")]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_open_files_are_bounded_and_closed(tmp_path):
    def held():
        return len(list(Path("/proc/self/fd").iterdir()))

    before = held()
    source = ShardSource(str(write_shards(tmp_path / "many", [1] * 90)))
    assert [source[index].captions() for index in range(90)] == [
        (f"picture {index}",) for index in range(90)
    ]
    assert before < held() <= before + OPEN_FILES
    open_local.cache_clear()
    assert held() <= before


BLOCK = 512
NAMES = [
    "a.jpg", "folder/b.txt", "../c.jpg", "/d.jpg", "ü" * 40 + ".png", "deep/" * 40 + "e.jpg", "long" * 60 + ".json",
    "dir.d/f.tar.gz",
]  # fmt: skip


def walk(path):
    """The members up to the damage, and the damage."""
    found = []
    try:
        found.extend(members(OpenFile(path)))
    except tarfile.TarError as error:
        return found, str(error)
    return found, None


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_the_files_that_the_library_finds(tmp_path, format):
    path = tmp_path / "t.tar"
    names = [name for name in NAMES if format != tarfile.USTAR_FORMAT or len(name.encode()) < 100]
    write_tar(path, [(name, b"x" * (n * 300)) for n, name in enumerate(names)], format)
    add_links(
        path,
        "link.jpg",
        *(tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE),
        format=format,
    )
    with tarfile.open(path, "a", format=format) as tar:
        tar.addfile(tarfile.TarInfo("last.jpg"), io.BytesIO())
    found, damage = walk(path)
    with tarfile.open(path, encoding="utf-8") as tar:
        assert found == [(info.name, info.offset_data, info.size) for info in tar if info.isfile()]
    assert [name for name, _, _ in found] == [*names, "last.jpg"]
    assert damage is None


def header(name=b"a.jpg", size=b"00000000010\0", kind=b"0"):
    block = (
        name.ljust(100, b"\0")
        + b"0000644\0"
        + b"0000000\0" * 2
        + size.ljust(12, b"\0")
        + b"00000000000\0"
    )
    block += b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(247)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def extended(content, kind=b"x"):
    return header(b"pax", b"%011o\0" % len(content), kind) + content + bytes(-len(content) % BLOCK)


GOOD = header() + b"content!".ljust(BLOCK, b"\0")


@pytest.mark.parametrize(
    ("tail", "says"),
    [
        (header(size=b"\xff" + b"\xff" * 11) + bytes(BLOCK), "negative size"),
        (header(size=b"\x80" + b"\x7f" * 11), "cut short"),
        (header(size=b"no number!!\0"), "invalid header"),
        (header(size=b"-0000020000\0"), "negative size"),
        (header()[:300], "truncated header"),
        (header().replace(b"a.jpg", b"b.jpg"), "bad checksum"),
        (random.Random(0).randbytes(BLOCK), ""),
        (header(size=b"77777777777\0", kind=b"x"), "an extended header of 8,589,"),
        (header(size=b"77777777777\0", kind=b"L"), "an extended header of 8,589,"),
        (extended(b"0 path=a\n"), "invalid header"),
        (extended(b"11 size=-1\n") + header(), "negative size"),
        (extended(b"9" * 5000 + b" path=a\n"), "digits"),
        (extended(b"12 path=b.jpg\n") * 5000 + GOOD, ""),
        (header(size=b"00000002000\0") + bytes(BLOCK), "cut short: 2,048 bytes of at least 2,560"),
        (bytes(1 << 21), "empty from byte 1,024 on"),
    ],
)
def test_what_lies_ends_the_walk_and_spares_what_came_before(tmp_path, tail, says):
    (tmp_path / "t.tar").write_bytes(GOOD + tail)
    found, damage = walk(tmp_path / "t.tar")
    assert found[0] == ("a.jpg", 512, 8)
    assert damage is not None
    assert says in damage


def test_mutated_archives_never_crash_and_stay_within_the_file(tmp_path):
    content = [(name, random.Random(n).randbytes(5) * 60 * n) for n, name in enumerate(NAMES)]
    path = write_tar(tmp_path / "t.tar", content, tarfile.PAX_FORMAT)
    archive, (whole, _) = path.read_bytes(), walk(path)
    for seed in range(200):
        source = random.Random(seed)
        cut = source.randrange(len(archive) + 1) if seed % 2 else len(archive)
        flips = [source.randrange(len(archive)) for _ in range(seed % 8)]
        mutated = bytearray(archive)
        for place in flips:
            mutated[place] = source.randrange(256)
        path.write_bytes(mutated[:cut])
        tracemalloc.start()
        found, damage = walk(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()
        assert all(BLOCK <= at <= cut and size >= 0 for _, at, size in found)
        sound = [member for member in whole if member[1] <= min([cut, *flips])]
        assert found[: len(sound)] == sound
        if not flips and damage is None:
            assert (
                cut >= len(archive) or cut % BLOCK == 0 or not any(archive[cut - cut % BLOCK : cut])
            )
