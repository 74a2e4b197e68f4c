"""Pairs from a folder: images, each with a text file of the same name, one caption per line, or with metadata."""

import os
import stat
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageFile, IptcImagePlugin
from PIL.TiffImagePlugin import TiffImageFile

from declip.data.images.decode import DAMAGE, EXTENSIONS, check_file, image_below, open_header
from declip.data.pair import LONGEST_CAPTION, BrokenPair, OnDemand, clean_captions, on_one_line
from declip.data.sources.entry import EntrySource
from declip.data.sources.splits import UNKNOWN, split_number
from declip.errors import UserError

LARGEST = 1 << 20  # bytes of XMP: titles and keywords take a few thousand
MOST_CAPTION_BYTES = 64 * LONGEST_CAPTION  # a larger .txt file does not hold captions
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
DC = "{http://purl.org/dc/elements/1.1/}"
XMP_TEXTS = (f"{DC}description", f"{DC}title")
XMP_KEYWORDS = f"{DC}subject"
IPTC_TAG = 33723  # of TIFF
# caption, headline and object name
IPTC_TEXTS = ((2, 120), (2, 105), (2, 5))
IPTC_KEYWORDS = (2, 25)
# Descriptions that cameras write into every file.
CAMERAS = {
    "olympus digital camera",
    "sony dsc",
    "samsung camera pictures",
    "kodak digital still camera",
    "default",
}


def metadata_captions(path: Path, key: str) -> list[str]:
    """Description, title and, in one line, keywords of an image file, of XMP and of IPTC; pixels are not decoded."""
    check_file(path, key)
    try:
        with path.open("rb") as file, open_header(file, key) as image:
            xmp = image.info.get("xmp", b"")
            iptc = _iptc(image, key)
    except (OSError, *DAMAGE, Image.DecompressionBombError):  # reported when the image is decoded
        return []
    packet = xmp if isinstance(xmp, bytes) else str(xmp).encode()
    texts, keywords = _xmp(packet, key)
    for name in IPTC_TEXTS:
        texts += _iptc_texts(iptc.get(name))
    keywords += _iptc_texts(iptc.get(IPTC_KEYWORDS))
    kept = [text for text in texts if on_one_line(text).casefold() not in CAMERAS]
    words = dict.fromkeys(filter(None, map(str.strip, keywords)))
    return [*kept, ", ".join(words)]


def _xmp(packet: bytes, key: str) -> tuple[list[str], list[str]]:
    """Texts and keywords of an XMP packet."""
    packet = packet.strip(b"\x00 \t\r\n")
    if len(packet) > LARGEST:
        raise BrokenPair(
            "invalid metadata", key, f"{len(packet):,} bytes of XMP, at most {LARGEST:,}"
        )
    if not packet:
        return [], []
    try:
        text = packet.decode("utf-8-sig")
        if "<!" in text:  # a document type, whose entities may grow without a limit
            raise ValueError("it declares a document type")
        root = ET.fromstring(text)
    except (ValueError, ET.ParseError, RecursionError) as error:
        raise BrokenPair("invalid metadata", key, f"XMP: {error}") from error
    texts = [text for name in XMP_TEXTS for text in _property(root, name)]
    return texts, [*_property(root, XMP_KEYWORDS)]


def _property(root: ET.Element, name: str) -> Iterator[str]:
    """The texts of a property: of its list, or its own.

    Only at the depths that the standard has, so that each element of a hostile packet is visited a few times at most.
    """
    for description in root.iter(f"{RDF}Description"):
        for element in description.iterfind(name):
            items = [*element.iterfind(f"*/{RDF}li")] or [element]
            for item in items:
                if item.text and item.text.strip():
                    yield item.text


def _iptc(image: ImageFile.ImageFile, key: str) -> dict[tuple[int, int], Any]:
    """Fields of IPTC by number: bytes, a list of them, or None where a field is empty."""
    # A JPEG has at most 64 kB. Pillow takes 5 s for the 6 MB that a TIFF may have, and has no public way to their size.
    size = 0
    if isinstance(image, TiffImageFile):
        size = len(image.tag_v2._tagdata.get(IPTC_TAG, b""))
    if size > LARGEST:
        raise BrokenPair("invalid metadata", key, f"{size:,} bytes of IPTC, at most {LARGEST:,}")
    return IptcImagePlugin.getiptcinfo(image) or {}


def _iptc_texts(value: bytes | list[bytes | None] | None) -> list[str]:
    """Texts of an IPTC field: UTF-8, or else Latin-1, which older programs wrote."""
    texts = list[str]()
    for raw in value if isinstance(value, list) else [value]:
        if not raw or not raw.strip():  # an empty field is None
            continue
        try:
            texts.append(raw.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append(raw.decode("latin-1"))
    return texts


class FileList(EntrySource):
    """Image files below a folder, by absolute or relative paths, without captions; none may leave the folder."""

    def __init__(self, name: str, root: Path, keys: Iterable[str | Path]) -> None:
        self.name = name
        self.root = root
        # A million paths take 0.1 GB as Python strings in every worker, and a third of it here, shared. They are bytes
        # since not every file's name is UTF-8.
        start = root.as_posix().rstrip("/") + "/"
        paths = (Path(key).as_posix().removeprefix(start) for key in keys)
        self._keys = pa.array(map(os.fsencode, paths), pa.large_binary())

    def __len__(self) -> int:
        return len(self._keys)

    def entry(self, index: int) -> tuple[str, str]:
        raw = self._keys[index].as_py()
        return raw.decode(errors="replace"), os.fsdecode(raw)

    def content(self, key: str, entry: str) -> Path:
        return image_below(self.root, entry, key, follow=False)

    def texts(self, key: str, entry: str) -> tuple[str, ...]:
        return ()


class FolderSource(FileList):
    """Images of a folder and of the folders in it, sorted by path; `a/b.jpg` has its captions in `a/b.txt`.

    Without that file they are the description, title and keywords in the image's XMP and IPTC metadata. Names that
    start with a dot are ignored. Linked folders are not entered.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path.name or str(path), path, sorted(_images(path)))
        if not len(self):
            raise UserError(
                f"'{path}' has no image ({', '.join(EXTENSIONS)}). Give a folder with images, or a table."
            )
        self.columns = OnDemand({"split": self._splits})

    def _splits(self) -> np.ndarray:
        """Those of folders named train, val and test, if all images are in such folders."""
        folders = pc.list_element(pc.split_pattern(self._keys, b"/"), 0)
        names = [name.decode(errors="replace") for name in folders.to_pylist()]
        numbers = np.array([*map(split_number, names)], np.int64)
        if UNKNOWN in numbers:
            numbers[:] = UNKNOWN
        return numbers

    def texts(self, key: str, entry: str) -> tuple[str, ...]:
        image = self.content(key, entry)
        path = image.with_suffix(".txt")
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # a named pipe blocks on open
                raise BrokenPair("missing caption", key, f"{path} is not a file")
            # The size in its status is 0 for some files of the system
            with path.open("rb") as file:
                content = file.read(MOST_CAPTION_BYTES + 1)
            if len(content) > MOST_CAPTION_BYTES:
                raise BrokenPair(
                    "caption too long", key, f"its file is longer than {MOST_CAPTION_BYTES:,} bytes"
                )
            return clean_captions(content.decode("utf-8-sig").splitlines(), key)
        except OSError as error:
            captions = list[str]()
            if isinstance(error, FileNotFoundError):
                captions = metadata_captions(image, key)
            if any(captions):
                return clean_captions(captions, key)
            raise BrokenPair("missing caption", key, str(error)) from error
        except UnicodeDecodeError as error:
            raise BrokenPair("invalid text", key, f"not UTF-8: {error}") from error


def _images(root: Path) -> Iterator[str]:
    """Paths of the images, relative to `root`; folders that cannot be read are skipped."""
    for folder, inner, names in os.walk(root):
        inner[:] = [name for name in inner if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        for name in names:
            _, ending = os.path.splitext(name)
            if not name.startswith(".") and ending.lower() in EXTENSIONS:
                yield (below / name).as_posix()
