"""Captions from an image's metadata: what is read, what a text file replaces, and hostile metadata."""

import io
import struct

import pytest
from PIL import Image

from declip.data.pair import BrokenPair
from declip.data.sources.open import open_images, open_source

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


def test_what_cameras_write_is_no_caption(tmp_path):
    write(tmp_path / "a.jpg", xmp(ALT.format("description", "OLYMPUS DIGITAL CAMERA         ")))
    with pytest.raises(BrokenPair, match="missing caption"):
        captions(tmp_path)


@pytest.mark.parametrize("kind", [".png", ".webp", ".tif"])
def test_other_formats(tmp_path, kind):
    image, packet = Image.new("RGB", (8, 8), "red"), xmp(ALT.format("title", "A bird"))
    if kind == ".png":
        from PIL.PngImagePlugin import PngInfo

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
    ],
    ids=["entities", "utf-16", "open tag", "broken encoding", "nested", "no xml"],
)
def test_hostile_metadata_are_a_broken_caption(tmp_path, packet):
    image = Image.new("RGB", (8, 8), "red")
    image.save(tmp_path / "a.webp", xmp=packet)
    with pytest.raises(BrokenPair, match="invalid metadata"):
        captions(tmp_path)
    found = open_images(tmp_path)[0]
    assert (found.image.size, found.captions) == ((8, 8), ())


def test_ten_megabytes_are_too_much(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", xmp=xmp(ALT.format("title", "x" * 10_000_000)))
    with pytest.raises(BrokenPair, match="10,000"):
        captions(tmp_path)


def test_a_damaged_image_without_text_has_no_caption(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"\xff\xd8\xff\xed\x00\x10Photoshop 3.0\x00")
    with pytest.raises(BrokenPair, match="missing caption"):
        captions(tmp_path)
