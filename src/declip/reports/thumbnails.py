"""Small copies of images for a page that is one file."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from declip.data.pair import BrokenPair, PairSource
from declip.reports.page import data_uri

LONGEST = 160  # characters of a caption that are shown
SIDE = 112  # pixels: sharp at 56 CSS pixels on a screen of double density


@dataclass(frozen=True)
class Thumbnail:
    """A data URI and the alternative text of an <img>."""

    src: str
    alt: str


def thumbnail(image: Image.Image, alt: str, side: int = SIDE) -> Thumbnail:
    """A smaller copy of an image, at most `side` pixels wide and high, as WebP (JPEG where Pillow lacks it)."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "webp" if features.check("webp") else "jpeg"
    return Thumbnail(data_uri(small, kind, quality=84), alt)


def pixels(array: np.ndarray, alt: str) -> Thumbnail:
    """A (3, H, W) image with values from 0 to 1, pixel for pixel, without loss."""
    image = Image.fromarray((array.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))
    return Thumbnail(data_uri(image, "png", optimize=True), alt)


def short(words: str) -> str:
    """Words cut off where they are too long to be shown."""
    return words if len(words) <= LONGEST else f"{words[:LONGEST].rstrip()} …"


class ThumbnailCache:
    """Thumbnails of a source's images, each read and encoded once."""

    def __init__(self, source: PairSource) -> None:
        self.source = source
        self._made: dict[int, Thumbnail | None] = {}

    def at(self, index: int) -> Thumbnail | None:
        """The image at a place of the source, named by its first caption; None when it cannot be read."""
        if index not in self._made:
            try:
                pair = self.source[index]
            except BrokenPair:
                self._made[index] = None
            else:
                self._made[index] = thumbnail(pair.image, short(pair.captions[0]))
        return self._made[index]
