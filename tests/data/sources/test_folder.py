"""Folders of images: captions in text files and in the images' metadata, and hostile metadata."""

import pickle
import struct

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from conftest import encoded
from data.fakes import reason_of
from declip.data.pair import LONGEST_CAPTION
from declip.data.sources.folder import FolderSource, metadata_captions
from declip.data.sources.open import open_images, open_source


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (value,) * 3).save(path)


def test_images_are_found_below_and_sorted(tmp_path):
    picture(tmp_path / "b.PNG", 9)
    picture(tmp_path / "a/z.jpg", 5)
    picture(tmp_path / "a/c.webp", 7)
    picture(tmp_path / ".hidden/x.png")
    picture(tmp_path / "._b.png")
    (tmp_path / "notes.md").write_text("no image")
    (tmp_path / "b.txt").write_text("\ufeffa gray square\n\n  another name \r\n", encoding="utf-8")
    source = FolderSource(tmp_path)
    assert source.name == tmp_path.name
    assert [source[index].key for index in range(len(source))] == ["a/c.webp", "a/z.jpg", "b.PNG"]
    for one in (source, pickle.loads(pickle.dumps(source))):
        assert one[2].captions() == ("a gray square", "another name")
        assert one[2].open().decoded().getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(IndexError):
        source[3]


def test_broken_pairs_keep_their_place(tmp_path):
    for name in ("empty", "latin", "long", "none", "ok", "page", "text"):
        picture(tmp_path / f"{name}.png")
    for name, content in {
        "z.HEIC": b"ftypheic",  # of phones, counted whether it can be read or not
        "z.txt": b"a photograph",
        "empty.txt": b" \n\n",
        "latin.txt": "café".encode("latin-1"),
        "long.txt": b"x" * 100_000,
        "ok.txt": b"fine",
        "page.txt": b"x\n" * 33 * LONGEST_CAPTION,
        "text.txt": b"not an image",
        "text.png": b"not an image",
    }.items():
        (tmp_path / name).write_bytes(content)
    source = FolderSource(tmp_path)
    assert [reason_of(source, index) for index in (0, 1, 2, 3, 5, 6, 7)] == [
        "empty caption", "invalid text", "caption too long", "missing caption", "caption too long",
        "unreadable image", "unreadable image",
    ]  # fmt: skip
    assert (source[4].captions(), source[6].captions()) == (("fine",), ("not an image",))


PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/">
{}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="w"?>"""
ALT = '<dc:{0}><rdf:Alt><rdf:li xml:lang="x-default">{1}</rdf:li></rdf:Alt></dc:{0}>'
BAG = "<dc:subject><rdf:Bag><rdf:li>bird</rdf:li><rdf:li> red </rdf:li><rdf:li>bird</rdf:li></rdf:Bag></dc:subject>"


def xmp(inner):
    return PACKET.format(inner).encode()


def iptc(*fields):
    """A JPEG's segment with records of IPTC."""
    records = b"".join(
        b"\x1c\x02" + bytes([number]) + struct.pack(">H", len(text)) + text
        for number, text in fields
    )
    block = (
        b"8BIM\x04\x04\x00\x00"
        + struct.pack(">I", len(records))
        + records
        + b"\x00" * (len(records) % 2)
    )
    content = b"Photoshop 3.0\x00" + block
    return b"\xff\xed" + struct.pack(">H", len(content) + 2) + content


def write(path, packet=b"", segment=b""):
    content = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", xmp=packet or None)
    path.write_bytes(content[:2] + segment + content[2:])


def captions(folder):
    return open_source(folder)[0].captions()


def test_description_title_and_keywords_are_captions(tmp_path):
    titles = ALT.format("title", "A bird") + ALT.format("description", "A red\nbird &amp; a tree")
    write(tmp_path / "a.jpg", xmp(titles + BAG))
    assert captions(tmp_path) == ("A red bird & a tree", "A bird", "bird, red")
    (tmp_path / "a.txt").write_text("typed")
    assert captions(tmp_path) == ("typed",)


def test_iptc_is_read_too_and_equal_texts_count_once(tmp_path):
    fields = (
        (120, "Ein Käfer".encode("latin-1")),
        (5, b"A bird"),
        (25, b"insect"),
        (25, "grün".encode()),
    )
    empty = ((5, b""), (25, b""))
    write(tmp_path / "a.jpg", xmp(ALT.format("title", "A bird")), iptc(*fields, *empty))
    assert captions(tmp_path) == ("A bird", "Ein Käfer", "insect, grün")


def test_a_million_fields_of_iptc_are_not_read(tmp_path):
    tags = ImageFileDirectory_v2()
    tags[33723] = b"\x1c\x02\x78\x00\x01a" * 1_000_000
    tags.tagtype[33723] = 7
    Image.new("RGB", (8, 8)).save(tmp_path / "a.tif", tiffinfo=tags)
    assert reason_of(open_source(tmp_path), 0) == "invalid metadata"


@pytest.mark.filterwarnings("error")
def test_a_large_image_has_captions_without_a_warning(tmp_path):
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp(ALT.format("title", "A bird")).decode())
    Image.new("1", (10_000, 10_000)).save(tmp_path / "a.png", pnginfo=info)
    assert captions(tmp_path) == ("A bird",)


def test_what_cameras_write_is_no_caption_and_a_damaged_image_has_none(tmp_path):
    write(tmp_path / "a.jpg", xmp(ALT.format("description", "OLYMPUS DIGITAL CAMERA         ")))
    (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff\xed\x00\x10Photoshop 3.0\x00")
    assert [reason_of(open_source(tmp_path), place) for place in (0, 1)] == ["missing caption"] * 2


@pytest.mark.parametrize("name", ["dc:description", "dc:title"])
def test_nested_metadata_are_read_once(tmp_path, name):
    packet = xmp(
        f"<{name}>" * 200
        + "<dc:subject>"
        + "<rdf:li>a</rdf:li>" * 400
        + "</dc:subject>"
        + f"</{name}>" * 200
    )
    Image.new("RGB", (8, 8)).save(tmp_path / "a.webp", xmp=packet)
    assert len("".join(metadata_captions(tmp_path / "a.webp", "a"))) < len(packet)


def test_other_formats(tmp_path):
    packet, info = xmp(ALT.format("title", "A bird")), PngInfo()
    info.add_itxt("XML:com.adobe.xmp", packet.decode())
    for name, options in (
        ("png", {"pnginfo": info}),
        ("tif", {"tiffinfo": {700: packet}}),
        ("webp", {"xmp": packet}),
    ):
        Image.new("RGB", (8, 8), "red").save(tmp_path / f"a.{name}", **options)
    source = open_source(tmp_path)
    assert [source[index].captions() for index in range(3)] == [("A bird",)] * 3


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
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.webp", xmp=packet)
    assert reason_of(open_source(tmp_path), 0) == "invalid metadata"
    found = open_images(tmp_path)[0]
    assert (found.open().size, found.captions()) == ((8, 8), ())
