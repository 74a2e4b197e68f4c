"""Pictures that came from elsewhere: memory stays bounded, nothing is started, nothing hangs, and all is said."""

import os
import pickle
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import declip
from declip.data.images.decode import decode
from declip.data.sources.open import open_source
from declip.recipe.load import load_recipe
from end_to_end.conftest import png
from hostile import ROOM, Trap, apart, quickly, said, sparse, written

pytestmark = pytest.mark.usefixtures("here")


def patched(kind, find, skip, form, *sizes, **options):
    """A small picture that says that it is a large one."""
    content = written(kind, **options)
    place = (content.index(find) if find else 0) + skip
    new = struct.pack(form, *sizes)
    return content[:place] + new + content[place + len(new) :]


def tiff(side):
    tags = [(256, side), (257, side), (258, 8), (259, 1), (262, 1), (273, 8), (277, 1), (278, side), (279, 100)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)


BOMB, PIXELS = zlib.compress(bytes(64 << 20), 1), zlib.compress(bytes(14))


IMAGES = {
    "50 gigapixels, PNG": (png(223_607, 223_607, (b"IDAT", zlib.compress(bytes(99)))), "image too large"),
    "179 megapixels, PNG": (png(13_377, 13_378, (b"IDAT", zlib.compress(bytes(99)))), "image too large"),
    "4 gigapixels, JPEG": (patched("JPEG", b"\xff\xc0", 5, ">HH", 65_500, 65_500), "image too large"),
    "4 gigapixels, GIF": (patched("GIF", b"", 6, "<HH", 65_535, 65_535), "image too large"),
    "WebP that grew": (
        patched("WEBP", b"VP8X", 12, "<HBHB", 0x3FFF, 0, 0x3FFF, 0, icc_profile=b"x" * 99),
        "image too large or unreadable image",  # Pillow 12.3 does not open it
    ),
    "1,000 gigapixels, BMP": (patched("BMP", b"", 18, "<ii", 1_000_000, 1_000_000), "image too large"),
    "1,000 gigapixels, TIFF": (tiff(1_000_000), "image too large"),
    "negative, BMP": (patched("BMP", b"", 18, "<ii", -5, -5), "image too large"),
    "comment that inflates, PNG": (png(2, 2, (b"zTXt", b"x\0\0" + BOMB), (b"IDAT", PIXELS)), "unreadable image"),
    "pixels that inflate, PNG": (png(2, 2, (b"IDAT", BOMB)), "read"),
    "profile that inflates, PNG": (png(2, 2, (b"iCCP", b"x\0\0" + BOMB), (b"IDAT", PIXELS)), "unreadable image"),
    "SVG with an entity": (b'<!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><svg>&e;</svg>', "unreadable image"),
    "PDF": (b"%PDF-1.7\n1 0 obj<</OpenAction<</S/Launch>>>>endobj\n", "unreadable image"),
    "EPS": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(harm) (w) file\n%%EOF\n", "unreadable image"),
    "EPS, binary head": (b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 30, 99) + bytes(200), "unreadable image"),
    "Python": (b"#!/usr/bin/python3\nopen('harm', 'w')\n", "unreadable image"),
    "PPM": (written("PPM"), "unreadable image"),
    "ICO": (written("ICO"), "unreadable image"),
    "pickle": (pickle.dumps(Trap(Path("harm"))), "unreadable image"),
    "nothing": (b"", "truncated image"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_are_bombs_or_none(name):
    content, expected = IMAGES[name]
    Path("a.jpg").write_bytes(content)
    for source in (Path("a.jpg"), content):
        got, megabytes = apart(lambda source=source: decode(source, "a.jpg"))
        assert got in expected.split(" or ")
        assert megabytes < ROOM
    assert not Path("harm").exists()


def test_a_file_of_20_gigabytes_is_not_read():
    sparse(Path("a.webp"), b"RIFF\xff\xff\xff\xffWEBPVP8X", 20 << 30)
    got, megabytes = apart(lambda: decode(Path("a.webp"), "a.webp"))
    assert got == "image too large"
    assert megabytes < ROOM


OTHER_THINGS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "folder": Path.mkdir,
    "link to itself": lambda path: path.symlink_to(path),
    "link to nothing": lambda path: path.symlink_to("nowhere"),
}


@pytest.mark.parametrize("name", OTHER_THINGS)
def test_what_is_no_file_does_not_hang(name, here):
    Path("set").mkdir()
    for place in ("a.jpg", "set/b.txt", "t.csv", "w.pth", "r.yaml"):
        OTHER_THINGS[name](here / place)
    Image.new("RGB", (4, 4)).save("set/b.png")
    reason = "missing image" if name.startswith("link") else "unreadable image"
    assert apart(lambda: decode(Path("a.jpg"), "a.jpg"))[0] == reason
    assert apart(lambda: open_source("set")[0])[0] == "missing caption"
    for work in (lambda: open_source("t.csv"), lambda: declip.load("w.pth"), lambda: load_recipe("r.yaml")):
        assert apart(work)[0] not in {"read", ""}


@quickly
@given(st.binary(max_size=200), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]), st.integers(0, 80))
@pytest.mark.filterwarnings("ignore")
def test_any_bytes_as_an_image(content, kind, kept):
    said(lambda: decode(written(kind)[:kept] + content, "k"))
