"""Base class of sources whose pairs are located first and read piece by piece."""

from abc import abstractmethod
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from typing import Any

from PIL import Image

from declip.data.images.decode import AnyImage, open_image
from declip.data.pair import LazyImage, Origin, Pair, PairSource


class EntrySource(PairSource):
    """Pairs that are located by number, then read as needed by key and entry; the methods may raise `BrokenPair`."""

    @abstractmethod
    def entry(self, index: int) -> tuple[str, Any]:
        """Locate pair `index`: its key, and what the methods below need to read it."""

    @abstractmethod
    def texts(self, key: str, entry: Any) -> tuple[str, ...]:
        """The cleaned captions, at least one."""

    @abstractmethod
    def content(self, key: str, entry: Any) -> AnyImage:
        """The image file, its bytes, or the image."""

    def __getitem__(self, index: int) -> Pair:
        key, entry = self.entry(index)
        captions = partial(self.texts, key, entry)
        opened = partial(self.opened, key, entry)
        return Pair(key, captions, opened, partial(self.origin, key, entry))

    def opened(self, key: str, entry: Any) -> LazyImage:
        """The image, whose pixels are decoded on demand."""
        return open_image(self.content(key, entry), key)

    def origin(self, key: str, entry: Any) -> Origin:
        """Where the image is stored."""
        content = self.content(key, entry)
        if isinstance(content, bytes):
            digest = blake2b(content, digest_size=16).hexdigest()
            return Origin("", 0, len(content), digest)
        if isinstance(content, Image.Image):
            return Origin()
        with suppress(OSError, ValueError):
            status = content.stat()
            # The inode, not the path, so that a folder may be moved
            stamp = f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
            return Origin(str(content.absolute()), 0, status.st_size, stamp)
        return Origin(str(content))
