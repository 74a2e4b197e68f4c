"""Pairs from a folder: images, each with a text file of the same name beside it, one caption a line."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
from PIL import Image

from declip.data.images.decode import EXTENSIONS, decode
from declip.data.images.lazy import UndecodedPair, open_picture
from declip.data.pair import LONGEST_CAPTION, BrokenPair, Pair, clean_captions
from declip.data.sources.origin import Origin, file_origin
from declip.errors import UserError

MOST_CAPTION_BYTES = 64 * LONGEST_CAPTION
"""A caption file beyond this is not read: it is another kind of file that happens to end in .txt."""


class FolderSource:
    """Images of a folder and of the folders in it, sorted by path; `a/b.jpg` has its captions in `a/b.txt`.

    Names that start with a dot are passed over. Linked folders are not entered.

    Args:
        path: The folder.

    Raises:
        UserError: It is no folder, or it holds no image.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if not self.path.is_dir():
            raise UserError(f"There is no folder '{self.path}'.")
        self.name = self.path.name or str(self.path)
        # A million paths are 0.1 GB as Python strings in every worker, and a third of it here, shared. They are bytes
        # since not every file's name is UTF-8.
        unread: list[OSError] = []
        self._keys = pa.array(map(os.fsencode, sorted(_images(self.path, unread.append))), pa.large_binary())
        if not len(self._keys):
            why = f" '{unread[0].filename}' cannot be read: {unread[0].strerror}." if unread else ""
            raise UserError(f"The folder '{self.path}' holds no image ({', '.join(EXTENSIONS)}).{why}")

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Pair:
        captions = self.captions(index)
        key, path = self._place(index)
        return Pair(key, decode(path, key), captions)

    def read_lazy(self, index: int) -> UndecodedPair:
        """The pair with its picture opened only; raises `BrokenPair`."""
        captions = self.captions(index)
        key, path = self._place(index)
        return UndecodedPair(key, open_picture(path, key), captions)

    def key(self, index: int) -> str:
        """The image's path below the folder."""
        return self._place(index)[0]

    def image(self, index: int) -> Image.Image:
        """The image of pair `index`, without its captions; raises `BrokenPair`."""
        key, path = self._place(index)
        return decode(path, key)

    def origin(self, index: int) -> Origin:
        """Where the image is."""
        return file_origin(self._place(index)[1])

    def captions(self, index: int) -> tuple[str, ...]:
        """The cleaned captions of pair `index`; raises `BrokenPair`."""
        key, image = self._place(index)
        path = image.with_suffix(".txt")
        try:
            if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
                raise BrokenPair("missing caption", key, f"{path} is not a file")
            with path.open("rb") as file:
                content = file.read(MOST_CAPTION_BYTES + 1)
        except OSError as error:
            raise BrokenPair("missing caption", key, str(error)) from error
        if len(content) > MOST_CAPTION_BYTES:
            raise BrokenPair("caption too long", key, f"its file is longer than {MOST_CAPTION_BYTES:,} bytes")
        try:
            lines = content.decode("utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise BrokenPair("invalid text", key, f"not UTF-8: {error}") from error
        return clean_captions(lines, key)

    def _place(self, index: int) -> tuple[str, Path]:
        """The key and the path of an image."""
        raw = self._keys[index].as_py()
        return raw.decode(errors="replace"), self.path / os.fsdecode(raw)


def _images(root: Path, failed: Callable[[OSError], None]) -> Iterator[str]:
    """Paths of the images, relative to `root`, with forward slashes on every platform.

    Folders that cannot be read, such as a disk's `lost+found`, are handed to `failed` and passed over.
    """
    for folder, inner, names in os.walk(root, onerror=failed):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in names:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS:
                yield (Path(folder) / name).relative_to(root).as_posix()
