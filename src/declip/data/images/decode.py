"""Decode an image file, or its bytes, to an upright RGB image, at once or on demand, or name the problem."""

import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError, features
from PIL.Image import Transpose
from PIL.JpegImagePlugin import JpegImageFile

from declip.data.pair import BrokenPair, LazyImage
from declip.errors import UserError

# The raster formats that data sets are made of. Pillow's others are rare, slow, or start other programs (EPS).
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
if features.check("avif"):
    FORMATS += ("AVIF",)
with suppress(ImportError):
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS += ("HEIF",)
HEIC = "HEIC photograph (pip install 'declip[heif]', or convert it to JPEG)"  # the reason that such a pair is broken
HEIC_BRANDS = (
    b"heic",
    b"heix",
    b"heim",
    b"heis",
    b"hevc",
    b"hevx",
    b"hevm",
    b"hevs",
    b"mif1",
    b"msf1",
)
# Extensions of images, including formats that cannot be read and count as broken.
EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
    ".heic",
    ".heif",
)
MOST_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb: 2 GiB / 4 / 3, twice
LARGEST_IMAGE = 100_000_000  # bytes of a file
# Errors of Pillow's readers for a damaged file, besides OSError.
DAMAGE = (
    *(SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, RuntimeError),
    *(struct.error, zlib.error),
)

# Inverse of each EXIF orientation from 2 on; 1 is already upright.
UPRIGHT = (Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM)
SIDEWAYS = (Transpose.TRANSPOSE, Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90)
TURNS = dict(enumerate((*UPRIGHT, *SIDEWAYS), 2))

SCALES = (8, 4, 2)  # divisors of the sides that libjpeg supports while it decodes
# Pixels that a side keeps at least; the decoders disagree about images smaller than a block
SMALLEST_SCALED = 8
# Color spaces that simplejpeg converts to the same RGB as Pillow
SAME_EVERYWHERE = ("YCbCr", "Gray", "RGB")
AnyImage = Path | bytes | Image.Image  # an image, its file, or the bytes of that
# What the Python functions take for an image, see `read_picture`
Picture = Image.Image | str | Path | np.ndarray


def decode(source: AnyImage, key: str, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """Read an image as upright RGB, transparent pixels over white, the first frame; raises `BrokenPair`."""
    return open_image(source, key, most_pixels).decoded()


def read_picture(given: Picture) -> Image.Image:
    """Read an image that a caller gives: a PIL image, a file or (H, W, 3) uint8; raises `UserError`."""
    if is_pixels(given):
        return Image.fromarray(given)
    kind = type(given).__name__
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        kind += f" {given.dtype} {tuple(given.shape)}"
    if not isinstance(given, str | Path | Image.Image):
        raise UserError(
            f"An image is a PIL image, a file or an array (H, W, 3) of uint8; {kind} was given."
        )
    try:
        if isinstance(given, Image.Image):
            return decode(given, kind)
        return decode(Path(given).expanduser(), str(given))
    except BrokenPair as broken:
        raise UserError(f"The image cannot be used: {broken}. Give another image.") from broken


def is_pixels(given: Any) -> TypeGuard[np.ndarray]:
    """Whether an object is an array (H, W, 3) of uint8."""
    return (
        isinstance(given, np.ndarray)
        and given.dtype == np.uint8
        and given.ndim == 3
        and given.shape[2] == 3
    )


@contextmanager
def opened(
    source: AnyImage, key: str, most_pixels: int = MOST_PIXELS
) -> Iterator[tuple[Image.Image, bytes]]:
    """Open an image, with the bytes of a file; errors here and while it is open become `BrokenPair`."""
    try:
        if isinstance(source, Image.Image):
            yield source, b""
            return
        if isinstance(source, Path):
            check_file(source, key)
            source = source.read_bytes()
        if not source:
            raise BrokenPair("truncated image", key, "no bytes")
        with open_header(BytesIO(source), key) as image:
            if image.width * image.height > most_pixels:
                raise Image.DecompressionBombError(
                    f"{image.width} x {image.height} pixels, at most {most_pixels:,}"
                )
            yield image, source
    except (Image.DecompressionBombError, MemoryError) as error:
        raise BrokenPair("image too large", key, str(error)) from error
    except UnidentifiedImageError as error:  # its message has an address in memory
        raise BrokenPair(
            "unreadable image", key, f"damaged, or none of {', '.join(FORMATS)}"
        ) from error
    except (OSError, *DAMAGE) as error:
        reason = "unreadable image"
        if "truncated" in str(error).lower():
            reason = "truncated image"
        raise BrokenPair(reason, key, f"{type(error).__name__}: {error}") from error


def open_header(file: BinaryIO, key: str) -> ImageFile.ImageFile:
    """Open an image of a known format; its pixels are not decoded."""
    with warnings.catch_warnings():
        # Pillow warns from half of its limit on; such an image is read.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(file, formats=FORMATS)
        except UnidentifiedImageError:
            file.seek(4)
            if "HEIF" not in FORMATS and file.read(8) in (b"ftyp" + brand for brand in HEIC_BRANDS):
                raise BrokenPair(HEIC, key) from None
            raise


def check_file(path: Path, key: str) -> None:
    """Refuse what cannot be opened as an image file, without opening it: a named pipe would block."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = str(error)
        if str(path) == key:  # `reason` repeats it
            reason = getattr(error, "strerror", None) or reason
        raise BrokenPair("missing image", key, reason) from error
    if status.st_size > LARGEST_IMAGE:
        raise BrokenPair(
            "image too large", key, f"a file of {status.st_size:,} bytes, at most {LARGEST_IMAGE:,}"
        )
    if not stat.S_ISREG(status.st_mode):
        raise BrokenPair("unreadable image", key, f"{path} is not a file")


def apply_exif(image: Image.Image) -> Image.Image:
    """Decode an opened image as RGB, turned by its EXIF orientation, transparent pixels over white."""
    image.load()
    turn = TURNS.get(orientation(image))
    upright = rgb(image)
    if turn is not None:
        upright = upright.transpose(turn)
    upright.info.clear()  # EXIF and XMP, by which it would be turned again when it is opened again
    return upright


def image_below(root: Path, path: str, key: str, *, follow: bool) -> Path:
    """The path of an image that may not leave a folder; with `follow`, links may not lead out either."""
    # Normalized first, so that the path checked is the path opened.
    plain = Path(os.path.abspath(root / path))
    inside = plain.is_relative_to(os.path.abspath(root))
    try:
        if inside and follow:
            inside = Path(os.path.realpath(plain)).is_relative_to(os.path.realpath(root))
    except (OSError, ValueError) as error:
        raise BrokenPair("missing image", key, str(error)) from error
    if not inside:
        raise BrokenPair("path outside image root", key, f"not below {root}")
    return plain


def rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: deep grays are scaled to 8 bits, transparent pixels lie over white."""
    if image.mode.startswith(("I", "F")):
        # The usual range of the type: 0 to 65,535; for floats 0 to 1, or 0 to 255
        values = np.nan_to_num(np.asarray(image, np.float32))
        top = 65_535.0
        if image.mode == "F":
            top = 1.0 if values.max(initial=0.0) <= 1.0 else 255.0
        # In TIFF 0 may be white, which Pillow applies at 8 bits only
        if getattr(image, "tag_v2", {}).get(262) == 0:
            values = top - values
        levels = values.clip(0.0, top) * (255.0 / top) + 0.5
        image = Image.fromarray(levels.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) if there is none or the EXIF block cannot be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (OSError, *DAMAGE):
        return 1


try:
    import simplejpeg
except ImportError:
    simplejpeg = None


class LazyJpeg(LazyImage):
    """A `LazyImage` of a JPEG file, opened as `image`."""

    def __init__(self, content: bytes, key: str, image: Image.Image) -> None:
        self.content = content
        self._key = key
        self._stored = image.size
        self._turn = TURNS.get(orientation(image))
        self.size = image.size
        if self._turn in SIDEWAYS:
            self.size = image.size[::-1]
        self.scales = tuple(scale for scale in SCALES if min(image.size) >= SMALLEST_SCALED * scale)

    def pixels(self, scale: int = 1) -> np.ndarray:
        """See `LazyImage`; by simplejpeg if it is installed and accepts the file, else by Pillow."""
        sides = [-(-side // scale) for side in self._stored]
        pixels = self._by_simplejpeg(*sides)
        if pixels is None:
            with opened(self.content, self._key) as (image, _):
                if scale > 1:
                    image.draft(None, (image.width // scale, image.height // scale))
                image.load()
                pixels = np.asarray(rgb(image))
        if self._turn is None:
            return pixels
        return np.asarray(Image.fromarray(pixels).transpose(self._turn))

    def _by_simplejpeg(self, width: int, height: int) -> np.ndarray | None:
        """The pixels as stored; None without simplejpeg, or for an unusual file that Pillow has to check."""
        if simplejpeg is None:
            return None
        try:
            stored_height, stored_width, colors, _ = simplejpeg.decode_jpeg_header(self.content)
            if (stored_width, stored_height) != self._stored or colors not in SAME_EVERYWHERE:
                return None
            options = dict[str, int]()
            if (width, height) != self._stored:
                options = {"min_width": width, "min_height": height}
            pixels = simplejpeg.decode_jpeg(self.content, **options)
        except (ValueError, MemoryError):
            return None
        if pixels.shape != (height, width, 3):
            return None
        return pixels


class LazyFile(LazyImage):
    """A `LazyImage` of a file that is decoded as a whole when its size or its pixels are asked for.

    The size needs the pixels too: a PNG may have its orientation behind them.
    """

    def __init__(self, content: bytes, key: str, most_pixels: int) -> None:
        self._content = content
        self._key = key
        self._most_pixels = most_pixels

    @cached_property
    def _upright(self) -> Image.Image:
        with opened(self._content, self._key, self._most_pixels) as (image, _):
            return apply_exif(image)

    @property
    def size(self) -> tuple[int, int]:  # type: ignore[override]  # read-only here
        """Width and height, upright."""
        return self._upright.size

    def pixels(self, scale: int = 1) -> np.ndarray:
        """See `LazyImage`."""
        return np.asarray(self._upright)


def encode(image: Image.Image, kind: str, **options: int) -> bytes:
    """The bytes of an image file; `options` are those of Pillow's `save`."""
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def open_image(source: AnyImage, key: str, most_pixels: int = MOST_PIXELS) -> LazyImage:
    """Open an image file or its content as `decode` does; the pixels of a file are decoded on demand."""
    with opened(source, key, most_pixels) as (image, content):
        if not content:
            return LazyImage(apply_exif(image))
        if isinstance(image, JpegImageFile):
            return LazyJpeg(content, key, image)
        return LazyFile(content, key, most_pixels)
