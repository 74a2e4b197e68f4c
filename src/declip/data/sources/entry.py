"""Base class of sources whose pairs are located first and read piece by piece."""

from abc import abstractmethod
from contextlib import suppress
from hashlib import blake2b
from typing import Any

from PIL import Image

from declip.data.images.decode import AnyImage, open_image
from declip.data.pair import LazyImage, LazyPair, Origin, Pair, PairSource


class EntrySource(PairSource):
    """Pairs that are located by number, then read as needed by key and entry; all methods may raise `BrokenPair`."""

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
        return self.read_lazy(index).decoded()

    def read_lazy(self, index: int) -> LazyPair:
        key, entry = self.entry(index)
        captions = self.texts(key, entry)
        return LazyPair(key, open_image(self.content(key, entry), key), captions)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.texts(*self.entry(index))

    def key(self, index: int) -> str:
        return self.entry(index)[0]

    def lazy_image(self, index: int) -> LazyImage:
        key, entry = self.entry(index)
        return open_image(self.content(key, entry), key)

    def origin(self, index: int) -> Origin:
        content = self.content(*self.entry(index))
        if isinstance(content, bytes):
            return Origin("", 0, len(content), blake2b(content, digest_size=16).hexdigest())
        if isinstance(content, Image.Image):
            return Origin()
        with suppress(OSError, ValueError):
            status = content.stat()
            # By its inode and not its path, so that a folder may be moved
            stamp = f"{status.st_ino}-{status.st_size}-{status.st_mtime_ns}"
            return Origin(str(content.absolute()), 0, status.st_size, stamp)
        return Origin(str(content))
