"""Image files that are opened by their headers and decoded when their pixels are asked for, no larger than needed."""

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from declip.data.images.decode import (
    FORMATS,
    MOST_PIXELS,
    SIDEWAYS,
    TURNS,
    apply_exif,
    check_file,
    decode,
    opened,
    orientation,
    raise_as_broken_pair,
    rgb,
)
from declip.data.pair import DecodedImage, LazyImage

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

SCALES = (8, 4, 2)
"""Divisors of the sides that libjpeg supports while it decodes."""

SMALLEST_SCALED = 8
"""Pixels that a side keeps at least; the decoders disagree about images smaller than a block."""

LARGEST_CONTENT = 100_000_000
"""Bytes of a file that are held undecoded."""

SAME_EVERYWHERE = ("YCbCr", "Gray", "RGB")
"""Color spaces of which simplejpeg makes the same RGB as Pillow."""


class LazyJpeg:
    """A `LazyImage` of a JPEG file; `stored` is its width and height before the EXIF orientation `turn` is applied."""

    def __init__(self, content: bytes, key: str, stored: tuple[int, int], turn: int) -> None:
        self.content = content
        self._key, self._stored, self._turn = key, stored, TURNS.get(turn)
        self.size = stored[::-1] if self._turn in SIDEWAYS else stored
        self.scales = tuple(scale for scale in SCALES if min(stored) >= SMALLEST_SCALED * scale)

    def pixels(self, scale: int = 1) -> np.ndarray:
        """See `LazyImage`; by simplejpeg where it is installed and accepts the file, else by Pillow."""
        width, height = (-(-side // scale) for side in self._stored)
        pixels = self._by_simplejpeg(width, height)
        if pixels is None:
            with raise_as_broken_pair(self._key), Image.open(BytesIO(self.content), formats=FORMATS) as image:
                if scale > 1:
                    image.draft(None, (self._stored[0] // scale, self._stored[1] // scale))
                image.load()
                pixels = np.asarray(rgb(image))
        return pixels if self._turn is None else np.asarray(Image.fromarray(pixels).transpose(self._turn))

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


def open_image(source: Path | bytes | Image.Image, key: str, most_pixels: int = MOST_PIXELS) -> LazyImage:
    """Open an image file or its content; a JPEG is left undecoded, all others are decoded as by `decode`.

    Raises:
        BrokenPair: As `decode` does; a JPEG whose pixels are damaged raises it when they are asked for.
    """
    if isinstance(source, Path):
        if check_file(source, key) > LARGEST_CONTENT:
            return DecodedImage(decode(source, key, most_pixels))
        with raise_as_broken_pair(key):
            source = source.read_bytes()
    with opened(source, key, most_pixels) as image:
        if isinstance(source, bytes) and isinstance(image, JpegImageFile):
            return LazyJpeg(source, key, image.size, orientation(image))
        return DecodedImage(apply_exif(image))
