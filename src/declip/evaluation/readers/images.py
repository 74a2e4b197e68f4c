"""Sources of evaluation sets: listed image files, images in memory, and sources with classes."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from declip.data.images.decode import image_below
from declip.data.pair import BrokenPair, LazyPair, Pair, PairSource
from declip.data.sources.entry import EntrySource
from declip.data.sources.subset import DerivedSource

Openers = Mapping[str, Callable[[], PairSource]]
"""Functions that open each split."""


class ListedFile(NamedTuple):
    """A listed image file."""

    key: str
    path: Path


class FileList(EntrySource):
    """Image files below a folder, without captions; paths that leave the folder are refused.

    Args:
        keys: n paths below `root`, absolute or relative to it.
    """

    def __init__(self, name: str, root: Path, keys: Sequence[str | Path]) -> None:
        self.name, self.root = name, root
        # Arrow is small and fast to send to workers; bytes, because names may not be UTF-8.
        start = root.as_posix().rstrip("/") + "/"
        paths = (os.fsencode(Path(key).as_posix().removeprefix(start)) for key in keys)
        self._keys = pa.array(paths, pa.large_binary())

    def __len__(self) -> int:
        return len(self._keys)

    def entry(self, index: int) -> ListedFile:
        raw = self._keys[index].as_py()
        key = raw.decode(errors="replace")
        return ListedFile(key, image_below(self.root, os.fsdecode(raw), key, follow=False))

    def content(self, entry: ListedFile) -> Path:
        return entry.path

    def texts(self, entry: ListedFile) -> tuple[str, ...]:
        return ()


class ImageArray(PairSource):
    """Images in memory, (n, H, W, 3) uint8, without captions."""

    def __init__(self, name: str, images: np.ndarray) -> None:
        self.name, self.images = name, images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Pair:
        return Pair(f"image {index}", Image.fromarray(self.images[index]), ())


class Classified(DerivedSource):
    """Images of a source with one class each.

    Args:
        labels: (n,) class numbers.
        rows: (n,) indices into the source; None: all images in order.
        captioned: Whether captions come from the source; otherwise the class name is the caption.
        broken: Rows of the source without a class; each is a broken pair, and its label, 0, is ignored.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]

    def __init__(
        self,
        source: PairSource,
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        *,
        rows: np.ndarray | None = None,
        captioned: bool = False,
        broken: Mapping[int, BrokenPair] | None = None,
    ) -> None:
        self.name, self.source, self.captioned, self.broken = source.name, source, captioned, broken or {}
        self.labels, self.class_names = np.asarray(labels, dtype=np.int64), tuple(class_names)
        self.rows = np.arange(len(source)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        captions = self.captions(index)
        return Pair(self.key(index), self.image(index), captions)

    def locate(self, index: int) -> tuple[PairSource, int]:
        return self.source, int(self.rows[index])

    def captions(self, index: int) -> tuple[str, ...]:
        if (row := int(self.rows[index])) in self.broken:
            raise self.broken[row]
        return self.source.captions(row) if self.captioned else (self.class_names[self.labels[index]],)

    def read_lazy(self, index: int) -> LazyPair:
        return PairSource.read_lazy(self, index)
