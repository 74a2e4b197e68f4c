"""Image files that are opened by their headers and decoded on demand, no larger than needed."""

from pathlib import Path

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile

from declip.data.images.decode import MOST_PIXELS, TURNS, apply_exif, opened, orientation, read_content, rgb
from declip.data.pair import LazyImage

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

SCALES = (8, 4, 2)  # divisors of the sides that libjpeg supports while it decodes
SMALLEST_SCALED = 8  # pixels that a side keeps at least; the decoders disagree about images smaller than a block
SAME_EVERYWHERE = ("YCbCr", "Gray", "RGB")  # color spaces that simplejpeg converts to the same RGB as Pillow


class LazyJpeg(LazyImage):
    """A `LazyImage` of a JPEG file, opened as `image`."""

    def __init__(self, content: bytes, key: str, image: Image.Image) -> None:
        self.content = content
        self._key, self._stored, self._turn = key, image.size, TURNS.get(orientation(image))
        self.size = image.size[::-1] if 5 <= orientation(image) <= 8 else image.size
        self.scales = tuple(scale for scale in SCALES if min(image.size) >= SMALLEST_SCALED * scale)

    def pixels(self, scale: int = 1) -> np.ndarray:
        """See `LazyImage`; by simplejpeg if it is installed and accepts the file, else by Pillow."""
        width, height = (-(-side // scale) for side in self._stored)
        pixels = self._by_simplejpeg(width, height)
        if pixels is None:
            with opened(self.content, self._key) as image:
                if scale > 1:
                    image.draft(None, (self._stored[0] // scale, self._stored[1] // scale))
                image.load()
                pixels = np.asarray(rgb(image))
        return pixels if self._turn is None else np.asarray(Image.fromarray(pixels).transpose(self._turn))

    def _by_simplejpeg(self, width: int, height: int) -> np.ndarray | None:
        """The pixels as stored; None without simplejpeg, or for an unusual file that Pillow has to check."""
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
    """Open an image file or its content as `decode` does; the pixels of a JPEG are decoded on demand."""
    content = source if isinstance(source, Image.Image) else read_content(source, key)
    with opened(content, key, most_pixels) as image:
        if isinstance(content, bytes) and isinstance(image, JpegImageFile):
            return LazyJpeg(content, key, image)
        return LazyImage(apply_exif(image))
