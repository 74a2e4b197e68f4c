"""Turn an image file, or its bytes, into an upright RGB image, or say what is wrong with it."""

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Transpose

from declip.data.pair import BrokenPair

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
"""The raster formats that data sets are made of. Pillow's others are rare, slow, or start other programs (EPS)."""

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

MOST_PIXELS = 178_956_970
"""Pillow's own limit for a decompression bomb: 2 GiB / 4 / 3, twice. One more and Pillow itself refuses."""

MOST_BYTES = 12 * MOST_PIXELS
"""Of a file: the largest image of 16 bits in four channels, and half as much again. Some of Pillow's readers take the
whole file into memory before they know the picture's size."""

ORIENTATION = 0x0112
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation; 1 is upright already."""

DAMAGE = (SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, struct.error, zlib.error)
"""What Pillow's readers let through when they meet a damaged file, besides OSError."""


def decode(source: Path | bytes, key: str, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Read an image as RGB: upright by its EXIF orientation, transparent pixels over white, the first frame.

    The size is checked in the header, before any pixel is decoded, so that memory stays below a few times
    `most_pixels` bytes whatever the file says.

    Args:
        source: The file, or its whole content.
        key: The pair's key, for the error.
        most_pixels: Largest width x height accepted, at most `MOST_PIXELS`.

    Returns:
        An image of mode RGB that holds no open file.

    Raises:
        BrokenPair: "missing image", "unreadable image", "truncated image" or "image too large".
    """
    with opened(source, key, most_pixels) as image:
        return upright(image)


@contextmanager
def opened(source: Path | bytes, key: str, most_pixels: int = MOST_PIXELS) -> Iterator[Image.Image]:
    """Open an image by its header and check its size; what fails here or while it is open says why.

    Args:
        source: The file, or its whole content.
        key: The pair's key, for the error.
        most_pixels: Largest width x height accepted, at most `MOST_PIXELS`.

    Raises:
        BrokenPair: As `decode` does.
    """
    if isinstance(source, Path):
        check_file(source, key)
    elif not source:
        raise BrokenPair("truncated image", key, "no bytes")
    with explained(key), Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
        width, height = image.size
        if width * height > most_pixels:
            raise BrokenPair("image too large", key, f"{width} x {height} pixels, at most {most_pixels:,}")
        yield image


@contextmanager
def explained(key: str) -> Iterator[None]:
    """Turn what Pillow raises into a `BrokenPair` with its reason."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError) as error:
        raise BrokenPair("image too large", key, str(error)) from error
    except Image.UnidentifiedImageError as error:
        raise BrokenPair("unreadable image", key, f"not one of {', '.join(FORMATS)}") from error
    except OSError as error:
        reason = "truncated image" if "truncated" in str(error).lower() else "unreadable image"
        raise BrokenPair(reason, key, str(error)) from error
    except DAMAGE as error:
        raise BrokenPair("unreadable image", key, f"{type(error).__name__}: {error}") from error


def upright(image: Image.Image) -> Image.Image:
    """Decode an opened image as RGB, turned by its EXIF orientation, transparent pixels over white."""
    image.load()
    turn = TURNS.get(orientation(image))
    colors = rgb(image)
    return colors if turn is None else colors.transpose(turn)


def image_below(root: Path, path: str, key: str, *, follow: bool) -> Path:
    """Where an image is whose path may not leave a folder.

    Args:
        root: The folder.
        path: Relative to it, or absolute and inside it.
        key: The pair's key, for the error.
        follow: Whether a link inside may not lead out either.

    Raises:
        BrokenPair: "path outside image root", or "missing image" where it is no path at all.
    """
    # Made plain first, so that what is checked is what is opened.
    plain = Path(os.path.normpath(root / path))
    inside = plain.is_relative_to(os.path.normpath(root))
    try:
        inside = inside and (not follow or Path(os.path.realpath(plain)).is_relative_to(os.path.realpath(root)))
    except (OSError, ValueError) as error:
        raise BrokenPair("missing image", key, str(error)) from error
    if not inside:
        raise BrokenPair("path outside image root", key, f"not below {root}")
    return plain


def check_file(path: Path, key: str) -> int:
    """The bytes of a file; refuses what is not a plain one: opening a named pipe would wait for ever.

    Raises:
        BrokenPair: "missing image", "unreadable image", "image too large" or "truncated image".
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise BrokenPair("missing image", key, str(error)) from error
    if not stat.S_ISREG(status.st_mode):
        raise BrokenPair("unreadable image", key, f"{path} is not a file")
    if status.st_size > MOST_BYTES:
        raise BrokenPair("image too large", key, f"a file of {status.st_size:,} bytes, at most {MOST_BYTES:,}")
    if not status.st_size:
        raise BrokenPair("truncated image", key, f"{path} is empty")
    return status.st_size


def rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: deep grays are scaled to 8 bits, transparent pixels lie over white."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if image.has_transparency_data:
        over = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, over).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scale a gray image of 16 or 32 bits to 8, by its type's usual range: 0 to 65,535, or 0 to 1 for floats."""
    values = np.asarray(image, np.float32)
    top = 65_535.0
    if image.mode == "F":
        top = 1.0 if float(np.nanmax(values, initial=0.0)) <= 1.0 else 255.0
    return Image.fromarray((np.nan_to_num(values).clip(0.0, top) * (255.0 / top) + 0.5).astype(np.uint8))


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none or the EXIF block cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except (OSError, *DAMAGE):
        return 1
