"""Re-encoding an image as a file no larger than training views need."""

from io import BytesIO

from PIL import Image

from declip.data.images.lazy import LazyJpeg
from declip.data.pair import LazyImage

SIZE = 256  # pixels of the shorter side: 1.15 times a view of 224, rounded
QUALITY = 92  # of JPEG
FEW_COLORS = 256  # an image of at most so many is a drawing, which may be smaller as PNG, and without artifacts
LONGEST_JPEG = 65_500  # pixels, libjpeg's limit
SCALED_TO = 2  # a JPEG is decoded no smaller than this many times the result: the filter that shrinks it does the rest


def downscaled_bytes(image: LazyImage, size: int) -> tuple[str, bytes]:
    """Encode an image as "jpg" or "png" of at most `size` pixels on its shorter side; a small JPEG file stays."""
    short = min(image.size)
    if isinstance(image, LazyJpeg) and short <= size:
        image.pixels()  # raises where the file is damaged
        return "jpg", image.content
    scale = next((scale for scale in image.scales if short >= SCALED_TO * scale * size), 1)
    decoded = Image.fromarray(image.pixels(scale))
    is_drawing = decoded.getcolors(FEW_COLORS) is not None
    if short > size:
        width, height = (max(size, round(side * size / short)) for side in image.size)
        decoded = decoded.resize((width, height), Image.Resampling.LANCZOS)
    files = [("jpg", _encoded(decoded, "JPEG", quality=QUALITY))] if max(decoded.size) <= LONGEST_JPEG else []
    if is_drawing or not files:
        files.append(("png", _encoded(decoded, "PNG", optimize=True)))
    return min(files, key=lambda file: len(file[1]))


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
