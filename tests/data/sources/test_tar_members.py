"""The walk through a tar's headers: against the standard library's own, and on archives that lie."""

import io
import os
import random
import tarfile
import tracemalloc

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.tars import write_tar
from declip.data.sources.shard_files import OpenFile
from declip.data.sources.shards import members

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
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE)
    with tarfile.open(path, "a", format=format) as tar:
        for kind in kinds:
            info = tarfile.TarInfo("link.jpg")
            info.type, info.linkname, info.size = kind, "/etc/passwd", 4096
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo("last.jpg"), io.BytesIO())
    found, damage = walk(path)
    with tarfile.open(path, encoding="utf-8") as tar:
        assert found == [(info.name, info.offset_data, info.size) for info in tar if info.isfile()]
    assert [name for name, _, _ in found] == [*names, "last.jpg"]
    assert damage is None


def header(name=b"a.jpg", size=b"00000000010\0", kind=b"0"):
    block = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + size.ljust(12, b"\0") + b"00000000000\0"
    block += b" " * 8 + kind + bytes(100) + b"ustar\x0000" + bytes(247)
    assert len(block) == BLOCK
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


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "t.tar"
    content = [(name, os.urandom(5) * 60 * n) for n, name in enumerate(NAMES)]
    return write_tar(path, content, tarfile.PAX_FORMAT).read_bytes()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=8), cut=st.integers(0, 20_000))
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
    assert all(BLOCK <= at <= len(mutated) and size >= 0 for _, at, size in found)
    untouched = min([cut, *(place for place, _ in flips)])
    (tmp_path / "whole.tar").write_bytes(archive)
    sound = [member for member in walk(tmp_path / "whole.tar")[0] if member[1] <= untouched]
    assert found[: len(sound)] == sound
    if not flips and damage is None:
        assert cut >= len(archive) or cut % BLOCK == 0 or not any(archive[cut - cut % BLOCK : cut])
