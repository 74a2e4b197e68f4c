"""Folders of images: captions in text files and in the images' metadata, and hostile metadata."""

import io
import pickle
import struct

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.fakes import reason_of
from declip.data.pair import LONGEST_CAPTION, BrokenPair
from declip.data.sources.folder import FolderSource
from declip.data.sources.open import open_images, open_source


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 4, 3), value, np.uint8)).save(path)


def test_images_are_found_below_and_sorted(tmp_path):
    picture(tmp_path / "b.PNG", 9)
    picture(tmp_path / "a/z.jpg", 5)
    picture(tmp_path / "a/c.webp", 7)
    picture(tmp_path / ".hidden/x.png")
    picture(tmp_path / "._b.png")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "b.txt").write_text("\ufeffa gray square\n\n  another name \r\n", encoding="utf-8")
    (tmp_path / "a/z.txt").write_text("z")
    (tmp_path / "a/c.txt").write_text("c")
    source = FolderSource(tmp_path)
    assert source.name == tmp_path.name
    assert [source[i].key for i in range(len(source))] == ["a/c.webp", "a/z.jpg", "b.PNG"]
    assert source[2].captions == source.captions(2) == ("a gray square", "another name")
    assert source[2].image.getpixel((0, 0)) == (9, 9, 9)
    again = pickle.loads(pickle.dumps(source))
    assert again[0].key == "a/c.webp"
    with pytest.raises(IndexError):
        source[3]


def test_broken_pairs_keep_their_place(tmp_path):
    for name in ("empty", "latin", "long", "none", "ok", "page", "text"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "z.HEIC").write_bytes(b"ftypheic")  # of phones, counted whether it can be read or not
    (tmp_path / "z.txt").write_text("a photograph")
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "long.txt").write_text("x" * 100_000)
    (tmp_path / "ok.txt").write_text("fine")
    (tmp_path / "page.txt").write_text("x\n" * 33 * LONGEST_CAPTION)
    (tmp_path / "text.txt").write_text("not an image")
    (tmp_path / "text.png").write_text("not an image")
    source = FolderSource(tmp_path)
    assert [reason_of(source, index) for index in (0, 1, 2, 3, 5, 6)] == [
        "empty caption", "invalid text", "caption too long", "missing caption", "caption too long", "unreadable image",
    ]  # fmt: skip
    assert (source[4].captions, source.captions(6)) == (("fine",), ("not an image",))
    with pytest.raises(BrokenPair, match=r"unreadable image: z.HEIC \(damaged, or none of JPEG, PNG"):
        source[7]


PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/">
{}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""
ALT = '<dc:{0}><rdf:Alt><rdf:li xml:lang="x-default">{1}</rdf:li></rdf:Alt></dc:{0}>'
BAG = "<dc:subject><rdf:Bag><rdf:li>bird</rdf:li><rdf:li> red </rdf:li><rdf:li>bird</rdf:li></rdf:Bag></dc:subject>"


def xmp(inner):
    return PACKET.format(inner).encode()


def iptc(*fields):
    """A JPEG's segment with records of IPTC."""
    records = b"".join(b"\x1c\x02" + bytes([number]) + struct.pack(">H", len(text)) + text for number, text in fields)
    block = b"8BIM\x04\x04\x00\x00" + struct.pack(">I", len(records)) + records + b"\x00" * (len(records) % 2)
    content = b"Photoshop 3.0\x00" + block
    return b"\xff\xed" + struct.pack(">H", len(content) + 2) + content


def write(path, packet=b"", segment=b""):
    written = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(written, "JPEG", **({"xmp": packet} if packet else {}))
    content = written.getvalue()
    path.write_bytes(content[:2] + segment + content[2:])


def captions(folder):
    return open_source(folder).captions(0)


def test_description_title_and_keywords_are_captions(tmp_path):
    write(
        tmp_path / "a.jpg",
        xmp(ALT.format("title", "A bird") + ALT.format("description", "A red\nbird &amp; a tree") + BAG),
    )
    assert captions(tmp_path) == ("A red bird & a tree", "A bird", "bird, red")
    (tmp_path / "a.txt").write_text("typed")
    assert captions(tmp_path) == ("typed",)


def test_iptc_is_read_too_and_equal_texts_count_once(tmp_path):
    fields = ((120, "Ein Käfer".encode("latin-1")), (5, b"A bird"), (25, b"insect"), (25, "grün".encode()))
    write(tmp_path / "a.jpg", xmp(ALT.format("title", "A bird")), iptc(*fields))
    assert captions(tmp_path) == ("A bird", "Ein Käfer", "insect, grün")


def test_what_cameras_write_is_no_caption_and_a_damaged_image_has_none(tmp_path):
    write(tmp_path / "a.jpg", xmp(ALT.format("description", "OLYMPUS DIGITAL CAMERA         ")))
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff\xed\x00\x10Photoshop 3.0\x00")
    assert [reason_of(open_source(tmp_path), place) for place in (0, 1)] == ["missing caption"] * 2


@pytest.mark.parametrize("kind", [".png", ".webp", ".tif"])
def test_other_formats(tmp_path, kind):
    image, packet = Image.new("RGB", (8, 8), "red"), xmp(ALT.format("title", "A bird"))
    if kind == ".png":
        info = PngInfo()
        info.add_itxt("XML:com.adobe.xmp", packet.decode())
        image.save(tmp_path / "a.png", pnginfo=info)
    elif kind == ".webp":
        image.save(tmp_path / "a.webp", xmp=packet)
    else:
        image.save(tmp_path / "a.tif", tiffinfo={700: packet})
    assert captions(tmp_path) == ("A bird",)


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    "packet",
    [
        BOMB.encode() + b"<x>&b;</x>",
        (BOMB + "<x>&b;</x>").encode("utf-16"),
        xmp("<dc:title>open"),
        xmp(ALT.format("title", "x")).replace(b"x-default", b"\xff\xfe"),
        b"<a>" * 50_000,
        b"no xml",
        xmp(ALT.format("title", "x" * 10_000_000)),
    ],
    ids=["entities", "utf-16", "open tag", "broken encoding", "nested", "no xml", "ten megabytes"],
)
def test_hostile_metadata_are_a_broken_caption(tmp_path, packet):
    image = Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / "a.webp", xmp=packet)
    with pytest.raises(BrokenPair, match="invalid metadata"):
        captions(tmp_path)
    found = open_images(tmp_path)[0]
    assert (found.image.size, found.captions) == ((8, 8), ())
