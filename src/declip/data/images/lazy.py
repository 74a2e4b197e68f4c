"""Pictures that are opened by their headers and decoded when their pixels are asked for, no larger than needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from declip.data.images.decode import (
    FORMATS,
    MOST_PIXELS,
    check_file,
    decode,
    explained,
    opened,
    orientation,
    rgb,
    upright,
)

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

if TYPE_CHECKING:
    from declip.data.pair import PairSource

SCALES = (8, 4, 2)
"""What libjpeg can divide a picture's sides by while it decodes."""

SMALLEST_SCALED = 8
"""Pixels that a side keeps at least; the decoders disagree about pictures smaller than a block."""

LARGEST_CONTENT = 100_000_000
"""Bytes of a file that are held undecoded."""

SAME_EVERYWHERE = ("YCbCr", "Gray", "RGB")
"""Color spaces of which simplejpeg makes the same RGB as Pillow."""

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
"""What undoes each EXIF orientation, as views of the same memory; 1 is upright already."""


SIDEWAYS = (5, 6, 7, 8)


class Picture(Protocol):
    """A picture whose size is known.

    Attributes:
        size: Width and height, upright.
        scales: What its sides can be divided by while it is decoded, largest first.
    """

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def scales(self) -> tuple[int, ...]: ...

    def pixels(self, scale: int = 1) -> np.ndarray:
        """RGB, upright, (H, W, 3) uint8, where H and W are the sides divided by 1 or one of `scales`, rounded up.

        Raises:
            BrokenPair: It cannot be decoded.
        """
        ...


class DecodedPicture:
    """A picture that has been decoded.

    Args:
        image: RGB, upright.
    """

    scales = ()

    def __init__(self, image: Image.Image) -> None:
        self.size = image.size
        self._image = image

    def pixels(self, scale: int = 1) -> np.ndarray:
        """See `Picture`."""
        return np.asarray(self._image)


class JpegPicture:
    """A JPEG file of which only the header was read.

    Args:
        content: The file.
        key: The pair's key, for errors.
        stored: Width and height in the file, before it is turned.
        turn: Its EXIF orientation.
    """

    def __init__(self, content: bytes, key: str, stored: tuple[int, int], turn: int) -> None:
        self.content = content
        self._key, self._stored, self._turn = key, stored, turn
        self.size = stored[::-1] if turn in SIDEWAYS else stored
        self.scales = tuple(scale for scale in SCALES if min(stored) >= SMALLEST_SCALED * scale)

    def pixels(self, scale: int = 1) -> np.ndarray:
        """See `Picture`; by simplejpeg where it is installed and content with the file, else by Pillow."""
        width, height = (-(-side // scale) for side in self._stored)
        pixels = self._by_simplejpeg(width, height)
        if pixels is None:
            pixels = self._by_pillow(scale)
        turn = TURNS.get(self._turn)
        return pixels if turn is None else turn(pixels)

    def _by_simplejpeg(self, width: int, height: int) -> np.ndarray | None:
        """The pixels as stored; None where simplejpeg is missing, or the file is odd and Pillow has to judge it."""
        if simplejpeg is None:
            return None
        try:
            stored_height, stored_width, colors, _ = simplejpeg.decode_jpeg_header(self.content)
            if (stored_width, stored_height) != self._stored or colors not in SAME_EVERYWHERE:
                return None
            least = {} if (width, height) == self._stored else {"min_width": width, "min_height": height}
            pixels = simplejpeg.decode_jpeg(self.content, **least)
        except (ValueError, MemoryError):
            return None
        return pixels if pixels.shape == (height, width, 3) else None

    def _by_pillow(self, scale: int) -> np.ndarray:
        width, height = self._stored
        with explained(self._key), Image.open(BytesIO(self.content), formats=FORMATS) as image:
            if scale > 1:
                image.draft(None, (width // scale, height // scale))
            image.load()
            return np.asarray(rgb(image))


def open_picture(source: Path | bytes, key: str, most_pixels: int = MOST_PIXELS) -> Picture:
    """Open an image file; a JPEG is left undecoded, all others are decoded as by `decode`.

    Args:
        source: The file, or its whole content.
        key: The pair's key, for errors.
        most_pixels: Largest width x height accepted, at most `MOST_PIXELS`.

    Raises:
        BrokenPair: As `decode` does; for pixels of a JPEG that cannot be decoded when they are asked for.
    """
    if isinstance(source, Path):
        if check_file(source, key) > LARGEST_CONTENT:
            return DecodedPicture(decode(source, key, most_pixels))
        with explained(key):
            source = source.read_bytes()
    with opened(source, key, most_pixels) as image:
        if isinstance(image, JpegImageFile):
            return JpegPicture(source, key, image.size, orientation(image))
        return DecodedPicture(upright(image))


@dataclass(frozen=True)
class UndecodedPair:
    """A pair whose picture may still be undecoded.

    Attributes:
        key: As a `Pair` has it.
        picture: Opened.
        captions: As a `Pair` has them.
        keywords: As a `Pair` has them.
    """

    key: str
    picture: Picture
    captions: tuple[str, ...]
    keywords: tuple[str, ...] = ()


def read_lazy(source: PairSource, index: int) -> UndecodedPair:
    """Read pair `index` without decoding more than its source must: by its own method `undecoded` where it has one.

    Raises:
        BrokenPair: It cannot be used, as far as can be told from the picture's header.
    """
    read: Callable[[int], UndecodedPair] | None = getattr(source, "undecoded", None)
    if read is not None:
        return read(index)
    pair = source[index]
    return UndecodedPair(pair.key, DecodedPicture(pair.image), pair.captions, pair.keywords)
