"""Decode an image file, or its bytes, to an upright RGB image, or name the problem."""

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError, features
from PIL.Image import Transpose

from declip.data.pair import BrokenPair

# The raster formats that data sets are made of. Pillow's others are rare, slow, or start other programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", *(("AVIF",) if features.check("avif") else ()))

# Extensions of images, including formats that cannot be read and count as broken.
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif")

MOST_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 2 GiB / 4 / 3, twice
LARGEST_IMAGE = 100_000_000  # bytes of a file

ORIENTATION = 0x0112
# Inverse of each EXIF orientation; 1 is already upright.
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}

# Errors of Pillow's readers for a damaged file, besides OSError.
DAMAGE = (SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, struct.error, zlib.error)


def decode(source: Path | bytes | Image.Image, key: str, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Read an image as RGB: upright by its EXIF orientation, transparent pixels over white, the first frame.

    The size is checked in the header, before any pixel is decoded. Raises `BrokenPair`.
    """
    with opened(source, key, most_pixels) as image:
        return apply_exif(image)


@contextmanager
def opened(source: Path | bytes | Image.Image, key: str, most_pixels: int = MOST_PIXELS) -> Iterator[Image.Image]:
    """Open an image by its header and check its size; errors here and while it is open become `BrokenPair`."""
    with raise_as_broken_pair(key):
        if isinstance(source, Image.Image):
            yield source
            return
        content = BytesIO(read_content(source, key))
        with warnings.catch_warnings():
            # Pillow warns from half of its limit on; such an image is read.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(content, formats=FORMATS)
        with image:
            if image.width * image.height > most_pixels:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, at most {most_pixels:,}")
            yield image


@contextmanager
def raise_as_broken_pair(key: str) -> Iterator[None]:
    try:
        yield
    except (Image.DecompressionBombError, MemoryError) as error:
        raise BrokenPair("image too large", key, str(error)) from error
    except UnidentifiedImageError as error:  # its message has an address in memory
        raise BrokenPair("unreadable image", key, f"damaged, or none of {', '.join(FORMATS)}") from error
    except (OSError, *DAMAGE) as error:
        reason = "truncated image" if "truncated" in str(error).lower() else "unreadable image"
        raise BrokenPair(reason, key, f"{type(error).__name__}: {error}") from error


def apply_exif(image: Image.Image) -> Image.Image:
    """Decode an opened image as RGB, turned by its EXIF orientation, transparent pixels over white."""
    image.load()
    turn = TURNS.get(orientation(image))
    upright = rgb(image) if turn is None else rgb(image).transpose(turn)
    upright.info.clear()  # EXIF and XMP, by which it would be turned again when it is opened again
    return upright


def image_below(root: Path, path: str, key: str, *, follow: bool) -> Path:
    """The path of an image that may not leave a folder; with `follow`, links may not lead out either."""
    # Normalized first, so that the path checked is the path opened.
    plain = Path(os.path.abspath(root / path))
    inside = plain.is_relative_to(os.path.abspath(root))
    try:
        inside = inside and (not follow or Path(os.path.realpath(plain)).is_relative_to(os.path.realpath(root)))
    except (OSError, ValueError) as error:
        raise BrokenPair("missing image", key, str(error)) from error
    if not inside:
        raise BrokenPair("path outside image root", key, f"not below {root}")
    return plain


def read_content(source: Path | bytes, key: str) -> bytes:
    """The bytes of an image file; raises `BrokenPair`, also for a named pipe, which blocks on open."""
    if isinstance(source, Path):
        try:
            status = source.stat()
        except (OSError, ValueError) as error:
            raise BrokenPair("missing image", key, str(error)) from error
        if status.st_size > LARGEST_IMAGE:
            raise BrokenPair("image too large", key, f"a file of {status.st_size:,} bytes, at most {LARGEST_IMAGE:,}")
        with raise_as_broken_pair(key):
            if not stat.S_ISREG(status.st_mode):
                raise OSError(f"{source} is not a file")
            source = source.read_bytes()
    if not source:
        raise BrokenPair("truncated image", key, "no bytes")
    return source


def rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: deep grays are scaled to 8 bits, transparent pixels lie over white."""
    if image.mode.startswith(("I", "F")):
        # By the type's usual range: 0 to 65,535, or 0 to 1 or 255 for floats.
        values = np.nan_to_num(np.asarray(image, np.float32))
        top = 65_535.0
        if image.mode == "F":
            top = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
        if getattr(image, "tag_v2", {}).get(262) == 0:  # of TIFF: 0 is white, which Pillow applies at 8 bits only
            values = top - values
        image = Image.fromarray((values.clip(0.0, top) * (255.0 / top) + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) if there is none or the EXIF block cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (OSError, *DAMAGE):
        return 1
