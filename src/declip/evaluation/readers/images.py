"""Sources of image files or arrays with a class each, or of image files with captions, and how readers open them."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
from PIL import Image

from declip.data.images.decode import decode, image_below
from declip.data.pair import Pair, PairSource, clean_captions, printable
from declip.data.sources.origin import Origin, file_origin
from declip.errors import UserError

S = TypeVar("S")

Openers = Mapping[str, Callable[[], PairSource]]
"""Functions that open each split; keys among "train", "validation", "test"."""


def opened(name: str, root: Path, expected: str, read: Callable[[], S]) -> S:
    """Call a reader; its errors about missing, damaged or unexpected files become a `UserError`.

    Args:
        expected: The files that belong into the dataset's folder `root`, for the message.
    """
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # a library's reader meets a damaged file in any way
        reason = printable(str(error).split(" You can use download")[0].rstrip("."))
        raise UserError(
            f"The files of '{name}' in '{root}' are not complete, not what was published, or damaged "
            f"({type(error).__name__}: {reason}). Expected below that folder: {expected}. Unpack the original archives."
        ) from error


def sample_split(labels: Sequence[int], train: int, test: int | None = None, seed: int = 0) -> dict[str, np.ndarray]:
    """Sample images of each class for training and, of the rest, for the test.

    Args:
        labels: n class numbers; the images in an order that does not depend on the machine.
        train: Images per class; a class with no more keeps at least one for the test, where it has two.
        test: Images per class; None takes all the rest.

    Returns:
        Rows of `labels` for "train" and "test", ascending.
    """
    generator = np.random.default_rng(seed)
    rows: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    known = np.asarray(labels)
    for label in np.unique(known):
        order = generator.permutation(np.flatnonzero(known == label))
        count = min(train, max(len(order) - 1, 1))
        rows["train"].append(order[:count])
        rows["test"].append(order[count:][:test])
    return {which: np.sort(np.concatenate(parts)) for which, parts in rows.items()}


class _Files(PairSource):
    """Image files below a folder, which a list from elsewhere cannot leave.

    Args:
        keys: n paths below the folder `root`, relative to it or not.
    """

    def __init__(self, name: str, root: Path, keys: Sequence[str | Path]) -> None:
        self.name, self.root = name, root
        # Arrow is small and quick to hand to a worker; bytes, since not every name is UTF-8.
        start = root.as_posix().rstrip("/") + "/"
        self._keys = pa.array(
            (os.fsencode(Path(key).as_posix().removeprefix(start)) for key in keys), pa.large_binary()
        )

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Pair:
        """Decode pair `index`; raises `BrokenPair`."""
        captions, key = self.captions(index), self.key(index)
        return Pair(key, decode(self._path(index), key), captions)

    def origin(self, index: int) -> Origin:
        """Origin of image `index`; raises `BrokenPair`."""
        return file_origin(self._path(index))

    def key(self, index: int) -> str:
        """Path of image `index`, for display."""
        return self._keys[index].as_py().decode(errors="replace")

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of pair `index`; raises `BrokenPair`."""
        raise NotImplementedError

    def _path(self, index: int) -> Path:
        return image_below(self.root, os.fsdecode(self._keys[index].as_py()), self.key(index), follow=False)


class _Classes(PairSource):
    """One class for each image; the caption is the class name alone."""

    labels: np.ndarray
    class_names: tuple[str, ...]

    def captions(self, index: int) -> tuple[str, ...]:
        """The class name."""
        return (self.class_names[self.labels[index]],)


class LabeledFiles(_Classes, _Files):
    """Image files with a class each."""

    def __init__(
        self, name: str, root: Path, keys: Sequence[str | Path], labels: Sequence[int], class_names: Sequence[str]
    ) -> None:
        super().__init__(name, root, keys)
        self.labels, self.class_names = np.asarray(labels, dtype=np.int64), tuple(class_names)


class CaptionedFiles(_Files):
    """Image files with captions, n lists as they were written."""

    def __init__(self, name: str, root: Path, keys: Sequence[str | Path], captions: Sequence[Sequence[str]]) -> None:
        super().__init__(name, root, keys)
        self._captions = pa.array(captions, pa.large_list(pa.large_string()))

    def captions(self, index: int) -> tuple[str, ...]:
        """The cleaned captions of pair `index`; raises `BrokenPair` where none is left."""
        return clean_captions(self._captions[index].as_py(), self.key(index))


class LabeledArrays(_Classes):
    """Images held in memory, (n, H, W, 3) uint8, with a class each."""

    def __init__(self, name: str, images: np.ndarray, labels: Sequence[int], class_names: Sequence[str]) -> None:
        self.name, self.images = name, images
        self.labels, self.class_names = np.asarray(labels, dtype=np.int64), tuple(class_names)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Pair:
        return Pair(f"image {index}", Image.fromarray(self.images[index]), self.captions(index))
