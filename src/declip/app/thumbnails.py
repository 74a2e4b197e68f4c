"""Pictures of the index as a browser gets them: small, encoded anew, kept in a bounded part of memory."""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Literal

from PIL import Image, features

Size = Literal["small", "large"]
SIDES: dict[Size, int] = {"small": 192, "large": 512}
"""Pixels of the longer side at most; none is enlarged."""

KEPT_BYTES = 64 << 20
"""Of all thumbnails that are kept."""

KIND = "webp" if features.check("webp") else "jpeg"
MEDIA_TYPE = f"image/{KIND}"


class Thumbnails:
    """Makes thumbnails and keeps those that were asked for last.

    Args:
        picture: Reads the picture of an id; raises `UserError` where that cannot be done.
        kept_bytes: Of all that are kept.
    """

    def __init__(self, picture: Callable[[int], Image.Image], kept_bytes: int = KEPT_BYTES) -> None:
        self._picture, self._room = picture, kept_bytes
        self._kept: OrderedDict[tuple[int, Size], bytes] = OrderedDict()
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self.bytes = 0
        """Of those that are kept."""

    def get(self, id: int, size: Size = "small") -> bytes:
        """The thumbnail of an id; raises `UserError` where there is no such picture any more."""
        with self._lock:
            if (found := self._kept.get((id, size))) is not None:
                self._kept.move_to_end((id, size))
                return found
        with self._reading:  # a source need not bear several threads, and one large picture at a time is enough
            image = self._picture(id)
        made = encoded(image, SIDES[size])
        with self._lock:
            if (id, size) not in self._kept:
                self._kept[id, size] = made
                self.bytes += len(made)
            while self.bytes > self._room:
                _, oldest = self._kept.popitem(last=False)
                self.bytes -= len(oldest)
        return made


def encoded(image: Image.Image, side: int) -> bytes:
    """A copy of at most `side` pixels a side, without anything that the file held besides its pixels."""
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    written = io.BytesIO()
    small.save(written, KIND, quality=82)
    return written.getvalue()
