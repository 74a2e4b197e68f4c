"""A picture as a file no larger than training views need."""

from __future__ import annotations

from io import BytesIO

from PIL import Image

from declip.data.images.lazy import LARGEST_CONTENT, JpegPicture, Picture

SIZE = 256
"""Pixels of the shorter side: 1.15 times a view of 224, rounded."""

FEW_COLOURS = 256
"""A picture of at most so many colors is a drawing, which may be smaller as PNG, and without blemish."""

LONGEST_JPEG = 65_500
"""Pixels, libjpeg's limit."""

SCALED_TO = 2
"""A JPEG is decoded no larger than this many times the result: the filter that shrinks it does the rest."""


def downscaled_bytes(picture: Picture, size: int, quality: int) -> tuple[str, bytes]:
    """Make a file of a picture.

    Args:
        picture: What to shrink; a JPEG file whose shorter side is no longer than `size` stays as it is.
        size: Pixels of the shorter side at most.
        quality: Of a JPEG file, 1 to 100.

    Returns:
        The end of the file's name, "jpg" or "png", and its content.

    Raises:
        BrokenPair: The picture cannot be decoded.
    """
    short = min(picture.size)
    if isinstance(picture, JpegPicture) and short <= size and len(picture.content) <= LARGEST_CONTENT:
        picture.pixels()  # fails where the file is broken
        return "jpg", picture.content
    scale = next((scale for scale in picture.scales if short >= SCALED_TO * scale * size), 1)
    image = Image.fromarray(picture.pixels(scale))
    drawn = image.getcolors(FEW_COLOURS) is not None
    if short > size:
        width, height = (max(size, round(side * size / short)) for side in picture.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    files = []
    if max(image.size) <= LONGEST_JPEG:
        files.append(("jpg", _encoded(image, "JPEG", quality=quality)))
    if drawn or not files:
        files.append(("png", _encoded(image, "PNG", optimize=True)))
    return min(files, key=lambda file: len(file[1]))


def _encoded(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
