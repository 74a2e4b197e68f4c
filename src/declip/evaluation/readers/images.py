"""Sources over what a reader found: image files or arrays with a class each, image files with captions."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from declip.data.images.decode import decode, image_below
from declip.data.pair import Pair, clean_captions
from declip.data.sources.origin import Origin, file_origin


class _Files:
    """Image files below a folder, which a list from elsewhere cannot leave.

    Their names are kept by Arrow, small and quick to hand to a worker, and as bytes, since not every name is UTF-8.

    Args:
        name: Name of the set.
        root: The folder.
        keys: n paths relative to it, with forward slashes.
    """

    def __init__(self, name: str, root: Path, keys: Sequence[str]) -> None:
        self.name, self.root = name, root
        self._keys = pa.array(map(os.fsencode, keys), pa.large_binary())

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Pair:
        """Decode pair `index`; raises `BrokenPair`."""
        captions, key = self.captions(index), self.key(index)
        return Pair(key, decode(self._path(index), key), captions)

    def origin(self, index: int) -> Origin:
        """Where the image is; raises `BrokenPair`."""
        return file_origin(self._path(index))

    def _path(self, index: int) -> Path:
        return image_below(self.root, os.fsdecode(self._keys[index].as_py()), self.key(index), follow=False)

    def key(self, index: int) -> str:
        """The image's path, to be shown."""
        return self._keys[index].as_py().decode(errors="replace")

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of pair `index`."""
        raise NotImplementedError


class LabeledFiles(_Files):
    """Image files with a class each; the caption is the class name alone.

    Args:
        name: Name of the set.
        root: The folder.
        keys: n paths relative to it, with forward slashes.
        labels: n class numbers.
        class_names: What zero-shot puts into templates.
    """

    def __init__(
        self, name: str, root: Path, keys: Sequence[str], labels: Sequence[int], class_names: Sequence[str]
    ) -> None:
        super().__init__(name, root, keys)
        self.labels, self.class_names = np.asarray(labels, dtype=np.int64), tuple(class_names)

    def captions(self, index: int) -> tuple[str, ...]:
        """The class name."""
        return (self.class_names[self.labels[index]],)


class CaptionedFiles(_Files):
    """Image files with captions.

    Args:
        name: Name of the set.
        root: The folder.
        keys: n paths relative to it, with forward slashes.
        captions: n lists of captions, as they were written.
    """

    def __init__(self, name: str, root: Path, keys: Sequence[str], captions: Sequence[Sequence[str]]) -> None:
        super().__init__(name, root, keys)
        self._captions = pa.array(captions, pa.large_list(pa.large_string()))

    def captions(self, index: int) -> tuple[str, ...]:
        """The cleaned captions of pair `index`; raises `BrokenPair` where none is left."""
        return clean_captions(self._captions[index].as_py(), self.key(index))


class LabeledArrays:
    """Images held in memory with a class each; the caption is the class name alone.

    Args:
        name: Name of the set.
        images: (n, H, W, 3) uint8.
        labels: n class numbers.
        class_names: What zero-shot puts into templates.
    """

    def __init__(self, name: str, images: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> None:
        self.name, self.images = name, images
        self.labels, self.class_names = np.asarray(labels, dtype=np.int64), tuple(class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Pair:
        return Pair(f"image {index}", Image.fromarray(self.images[index]), self.captions(index))

    def captions(self, index: int) -> tuple[str, ...]:
        """The class name."""
        return (self.class_names[self.labels[index]],)
