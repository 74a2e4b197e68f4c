"""Pictures for a page that is one file: small, encoded once, as data URIs."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

from declip.data.pair import BrokenPair, PairSource

LONGEST = 160  # characters of a caption that are shown
SIDE = 112  # pixels: sharp at 56 CSS pixels on a screen of double density


@dataclass(frozen=True)
class Picture:
    """What an <img> needs.

    Attributes:
        src: A data URI.
        alt: What it shows.
    """

    src: str
    alt: str


def thumbnail(image: Image.Image, alt: str, side: int = SIDE) -> Picture:
    """A smaller copy of an image, at most `side` pixels wide and high, as WebP (JPEG where Pillow lacks it)."""
    small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    kind = "webp" if features.check("webp") else "jpeg"
    return Picture(_data_uri(small, kind, quality=84), alt)


def pixels(array: np.ndarray, alt: str) -> Picture:
    """An image pixel for pixel, without loss.

    Args:
        array: (3, H, W), values 0 to 1; beyond is cut off.
        alt: What it shows.
    """
    image = Image.fromarray((array.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0))
    return Picture(_data_uri(image, "png", optimize=True), alt)


def short(words: str) -> str:
    """Words cut off where they are too long to be shown."""
    return words if len(words) <= LONGEST else f"{words[:LONGEST].rstrip()} …"


class Pictures:
    """Thumbnails of a source's images, each read and encoded once.

    Args:
        source: Where the images are.
    """

    def __init__(self, source: PairSource) -> None:
        self.source = source
        self._made: dict[int, Picture | None] = {}

    def at(self, index: int) -> Picture | None:
        """The image at a place of the source, named by its first caption; None when it cannot be read."""
        if index not in self._made:
            try:
                pair = self.source[index]
            except BrokenPair:
                self._made[index] = None
            else:
                self._made[index] = thumbnail(pair.image, short(pair.captions[0]))
        return self._made[index]


def _data_uri(image: Image.Image, kind: str, **options: int | bool) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
