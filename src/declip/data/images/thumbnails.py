"""Small copies of images for a page that is one file."""

import base64
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

from declip.data.images.decode import encode
from declip.data.pair import BrokenPair, PairSource
from declip.io.text import sanitize

# Pixels: sharp at 56 CSS pixels on a screen of double density.
SIDE = 112
ENOUGH = 2 * SIDE  # pixels of the shorter side that an image is decoded to


class Thumbnail(NamedTuple):
    """A data URI and the alternative text of an <img>."""

    src: str
    alt: str


Thumbnails = Callable[[int], Thumbnail | None]


def thumbnail(image: Image.Image, alt: str, side: int = SIDE) -> Thumbnail:
    """A smaller copy of an image, at most `side` pixels wide and high, as WebP."""
    return Thumbnail(_data_uri(shrink(image, side), "webp", quality=84), alt)


def shrink(image: Image.Image, side: int) -> Image.Image:
    """A copy of an image, RGB, at most `side` pixels wide and high, without the metadata of its file."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    small.info.clear()
    return small


def pixels(array: np.ndarray, alt: str) -> Thumbnail:
    """A (3, H, W) image with values from 0 to 1, pixel for pixel, without loss."""
    levels = (array.clip(0, 1) * 255).round().astype(np.uint8)
    image = Image.fromarray(levels.transpose(1, 2, 0))
    return Thumbnail(_data_uri(image, "png", optimize=True), alt)


def thumbnails_of(source: PairSource) -> Thumbnails:
    """Thumbnails of a source's images by index, named by their captions, each made once; None for broken pairs."""

    @cache
    def at(index: int) -> Thumbnail | None:
        try:
            pair = source[index]
            caption = pair.captions()[0]
            image = Image.fromarray(pair.image(ENOUGH))
        except BrokenPair:
            return None
        return thumbnail(image, sanitize(caption))

    return at


def _data_uri(image: Image.Image, kind: str, **options: int) -> str:
    content = encode(image, kind, **options)
    text = base64.b64encode(content).decode()
    return f"data:image/{kind};base64,{text}"
