"""Texts in an image file: title, description and keywords of its IPTC and XMP metadata."""

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, IptcImagePlugin

from declip.data.images.decode import DAMAGE, FORMATS
from declip.data.pair import BrokenPair

LARGEST = 1 << 20  # bytes of XMP: titles and keywords take a few thousand
RDF, DC = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}", "{http://purl.org/dc/elements/1.1/}"
XMP_TEXTS, XMP_KEYWORDS = (f"{DC}description", f"{DC}title"), f"{DC}subject"
IPTC_TEXTS, IPTC_KEYWORDS = ((2, 120), (2, 105), (2, 5)), (2, 25)  # caption, headline and object name
CAMERAS = {"olympus digital camera", "sony dsc", "samsung camera pictures", "kodak digital still camera", "default"}
"""Descriptions that cameras write into every file."""


def metadata_captions(path: Path, key: str) -> list[str]:
    """Description, title and, in one line, keywords of an image file, of XMP and of IPTC; pixels are not decoded.

    Raises:
        BrokenPair: The metadata are too large, damaged, or have entities or an encoding other than UTF-8.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            xmp = image.info.get("xmp", b"")
            iptc = IptcImagePlugin.getiptcinfo(image) or {}
    except (OSError, *DAMAGE, Image.DecompressionBombError):  # reported when the image is decoded
        return []
    texts, keywords = _xmp(xmp if isinstance(xmp, bytes) else str(xmp).encode(), key)
    texts += [text for name in IPTC_TEXTS for text in _decoded(iptc.get(name))]
    keywords += _decoded(iptc.get(IPTC_KEYWORDS))
    texts = [text for text in texts if " ".join(text.split()).casefold() not in CAMERAS]
    words = dict.fromkeys(word for word in map(str.strip, keywords) if word)
    return [*texts, ", ".join(words)]


def _xmp(packet: bytes, key: str) -> tuple[list[str], list[str]]:
    """Texts and keywords of an XMP packet."""
    packet = packet.strip(b"\x00 \t\r\n")
    if len(packet) > LARGEST:
        raise BrokenPair("invalid metadata", key, f"{len(packet):,} bytes of XMP, at most {LARGEST:,}")
    if not packet:
        return [], []
    try:
        text = packet.decode("utf-8-sig")
        if "<!" in text:  # a document type, whose entities may grow without a limit
            raise ValueError("it declares a document type")
        root = ET.fromstring(text)
    except (ValueError, ET.ParseError, RecursionError) as error:
        raise BrokenPair("invalid metadata", key, f"XMP: {error}") from error
    texts = [text for name in XMP_TEXTS for found in root.iter(name) for text in _items(found)]
    return texts, [text for found in root.iter(XMP_KEYWORDS) for text in _items(found)]


def _items(element: ET.Element) -> Iterator[str]:
    """The texts of a list, or of the element itself."""
    items = [*element.iter(f"{RDF}li")]
    yield from (item.text for item in items or [element] if item.text and item.text.strip())


def _decoded(value: bytes | list[bytes] | None) -> list[str]:
    """Texts of an IPTC field: UTF-8, or else Latin-1, which older programs wrote."""
    found = list[str]()
    for raw in value if isinstance(value, list) else [value or b""]:
        try:
            found.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            found.append(raw.decode("latin-1"))
    return [text for text in found if text.strip()]
