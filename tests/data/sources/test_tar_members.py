"""The walk through a tar's headers, against the standard library, and on archives that lie."""

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.tars import write_tar
from declip.data.sources.tar_members import BLOCK, DamagedTar, Member, members
from declip.io.open_file import OpenFile

NAMES = [
    "a.jpg",
    "folder/b.txt",
    "../c.jpg",
    "/d.jpg",
    "ü" * 40 + ".png",
    "deep/" * 40 + "e.jpg",
    "long" * 60 + ".json",
    "dir.d/f.tar.gz",
]


def walk(path: Path) -> tuple[list[Member], str | None]:
    """The members up to the damage, and the damage."""
    found: list[Member] = []
    try:
        for member in members(OpenFile(path)):
            found.append(member)
    except DamagedTar as error:
        return found, str(error)
    return found, None


def by_the_library(path: Path) -> list[Member]:
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        return [Member(i.name.encode(errors="surrogateescape"), i.offset_data, i.size) for i in tar if i.isfile()]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_the_library(tmp_path, format):
    names = [name for name in NAMES if format != tarfile.USTAR_FORMAT or len(name.encode()) < 100]
    names += ["folder/" * 20 + "posix.jpg"]
    path = write_tar(tmp_path / "t.tar", [(name, b"x" * (n * 300)) for n, name in enumerate(names)], format)
    found, damage = walk(path)
    assert found == by_the_library(path)
    assert len(found) == len(names)
    assert damage is None


def test_links_devices_and_folders_are_only_names(tmp_path):
    kinds = {
        "link.jpg": tarfile.SYMTYPE, "hard.jpg": tarfile.LNKTYPE, "pipe.jpg": tarfile.FIFOTYPE,
        "disk.jpg": tarfile.BLKTYPE, "folder.jpg": tarfile.DIRTYPE,
    }  # fmt: skip
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, kind in kinds.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 4096
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    found, damage = walk(tmp_path / "t.tar")
    assert [member.name for member in found] == [b"a.jpg"]
    assert damage is None


def header(name: bytes = b"a.jpg", size: bytes = b"00000000010\0", kind: bytes = b"0") -> bytes:
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    block += b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(247)
    assert len(block) == BLOCK
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def record(key: bytes, value: bytes) -> bytes:
    for length in range(len(key) + len(value) + 3, 10_000_000):
        text = b"%d %s=%s\n" % (length, key, value)
        if len(text) == length:
            return text
    raise AssertionError


def extended(content: bytes, kind: bytes = b"x") -> bytes:
    return header(b"pax", b"%011o\0" % len(content), kind) + content + bytes(-len(content) % BLOCK)


GOOD = header() + b"content!".ljust(BLOCK, b"\0")


@pytest.mark.parametrize(
    ("tail", "says"),
    [
        (header(size=b"\xff" + b"\xff" * 11) + bytes(BLOCK), "holds no numbers"),
        (header(size=b"\x80" + b"\x7f" * 11), "cut short"),
        (header(size=b"77777777777\0"), "cut short"),
        (header(size=b"no number!!\0"), "holds no numbers"),
        (header(size=b"-0000000001\0"), "holds no numbers"),
        (header()[:300], "cut short in the header"),
        (header().replace(b"a.jpg", b"b.jpg"), "wrong checksum"),
        (os.urandom(BLOCK), "holds no numbers|wrong checksum"),
        (header(size=b"77777777777\0", kind=b"x"), "an extended header of 8,589,934,591 bytes"),
        (header(size=b"77777777777\0", kind=b"L"), "an extended header of 8,589,934,591 bytes"),
        (extended(b"99999999999999999999 path=a\n"), "is not one"),
        (extended(b"0 path=a\n"), "is not one"),
        (extended(b"-9 path=a\n"), "is not one"),
        (extended(b"900 path=a\n"), "is not one"),
        (extended(record(b"size", b"-1")) + header(), "is not one"),
        (extended(record(b"path", b"x" * 5000)) + header(), "a name of 5,000 bytes"),
        (header(kind=b"S") + bytes(BLOCK), "sparse"),
        (header(size=b"00000002000\0") + bytes(BLOCK), "cut short: 2,048 bytes of at least 2,560"),
    ],
)
def test_what_lies_ends_the_walk_and_spares_what_came_before(tmp_path, tail, says):
    (tmp_path / "t.tar").write_bytes(GOOD + tail)
    found, damage = walk(tmp_path / "t.tar")
    assert found[0] == Member(b"a.jpg", 512, 8)
    assert damage is not None
    assert any(part in damage for part in says.split("|"))


def test_thousands_of_extended_headers_in_a_row_neither_recurse_nor_grow(tmp_path):
    (tmp_path / "t.tar").write_bytes(extended(record(b"path", b"b.jpg")) * 5000 + GOOD)
    assert walk(tmp_path / "t.tar") == ([Member(b"b.jpg", 5000 * 1024 + 512, 8)], None)


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("tar") / "t.tar"
    content = [(name, os.urandom(5) * 60 * n) for n, name in enumerate(NAMES)]
    return write_tar(path, content, tarfile.PAX_FORMAT).read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=8),
    cut=st.integers(0, 20_000),
)
@example(flips=[], cut=20_000)
def test_mutated_archives_never_crash_and_stay_within_the_file(tmp_path, archive, flips, cut):
    mutated = bytearray(archive[:cut])
    for place, value in flips:
        if place < len(mutated):
            mutated[place] = value
    (tmp_path / "t.tar").write_bytes(mutated)
    tracemalloc.start()
    try:
        found, damage = walk(tmp_path / "t.tar")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert all(BLOCK <= member.at <= len(mutated) and member.size >= 0 for member in found)
    untouched = min([cut, *(place for place, _ in flips)])
    (tmp_path / "whole.tar").write_bytes(archive)
    sound = [member for member in walk(tmp_path / "whole.tar")[0] if member.at <= untouched]
    assert found[: len(sound)] == sound
    if not flips and damage is None:
        assert cut >= len(archive) or cut % BLOCK == 0 or not any(archive[cut - cut % BLOCK : cut])
