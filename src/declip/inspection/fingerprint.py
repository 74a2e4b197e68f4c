"""Short hashes of images and captions, to find duplicates without keeping the images."""

from hashlib import blake2b
from typing import cast

import numpy as np
from PIL import Image

from declip.data.text.tokenizer import clean

COARSE, FINE = 8, 16
"""Steps to the right and down that a small copy has: hashes of 128 and of 512 bits."""

LOOK = np.dtype([("coarse", np.uint64, (2,)), ("fine", np.uint64, (8,)), ("tint", np.uint8, (3,))])
"""What an image looks like, 83 bytes: two hashes, and its mean red, green and blue."""

STEP = 2
"""Gray levels by which a neighbor must be brighter to count, so that flat areas do not hash their noise."""


def image_hash(image: Image.Image) -> int:
    """64 bits of an RGB image's size and pixels: equal for equal images, and for no others but by one in 10^19."""
    digest = blake2b(repr(image.size).encode(), digest_size=8)
    digest.update(image.tobytes())
    return int.from_bytes(digest.digest(), "little")


def caption_hash(caption: str) -> int:
    """64 bits of a caption as the tokenizer cleans it: captions that a model cannot tell apart hash alike."""
    return int.from_bytes(blake2b(clean(caption).encode(), digest_size=8).digest(), "little")


def look(image: Image.Image) -> np.void:
    """Hash the appearance of an image: where it gets brighter, and its mean color.

    The hashes are dHash (Krawetz 2013, "Kind of Like That") in both directions: one bit for each of 8 x 8, or 16 x 16,
    gray pixels of a small copy that says whether its right, or lower, neighbor is brighter. A copy that was scaled or
    compressed again differs in a few bits. The coarse one is quick to search by; the fine one tells a plus from a
    minus in a circle, and the color one drawing in red from the same in blue.
    """
    small, larger = _small(image, COARSE + 1), _small(image, FINE + 1)
    tint = small.mean((0, 1)).round().astype(np.uint8)
    return cast(np.void, np.array((_brighter(small), _brighter(larger), tint), LOOK)[()])


def _small(image: Image.Image, side: int) -> np.ndarray:
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0), np.float32)


def _brighter(small: np.ndarray) -> np.ndarray:
    gray = small @ np.array([0.299, 0.587, 0.114], np.float32)
    right = gray[:-1, 1:] - gray[:-1, :-1] > STEP
    down = gray[1:, :-1] - gray[:-1, :-1] > STEP
    return np.packbits(np.stack([right, down])).view(np.uint64)


def is_blank(image: Image.Image, seen: np.void) -> bool:
    """Whether an RGB image has one color only; what `look` saw spares most images the count."""
    return not seen["fine"].any() and all(low == high for low, high in image.getextrema())  # type: ignore[misc]
