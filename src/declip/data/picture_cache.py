"""Built-in pictures that were made once: how a folder of them is checked, and read by memory map."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from declip.data.pair import Pair
from declip.errors import UserError
from declip.io.atomic import cache_folder

TABLE, MANIFEST, CHECKSUMS, NOTICE = "pairs.parquet", "manifest.json", "checksums.json", "NOTICE.txt"
IMAGES = "images"
"""Beginning of the names of the files that hold pixels."""

GREY, COLOUR = f"{IMAGES}-grey.bin", f"{IMAGES}-colour.bin"
"""Pixels of drawings without and with colour, uint8, one after the other; grey ones take a third of the room."""


@dataclass(frozen=True)
class Cache:
    """A folder of built-in pictures.

    Attributes:
        name: The folder's name below the cache, and the set's after "builtin:".
        layout: Raised when the files change their meaning; a folder of another layout is built anew.
        effort: What making it takes, in a few words.
    """

    name: str
    layout: int
    effort: str

    def folder(self, cache: str | Path | None = None) -> Path:
        """Where it is, or is to be, in a cache folder; None for the usual one."""
        return (cache_folder() if cache is None else Path(cache).expanduser()) / self.name

    def check(self, folder: Path, images_too: bool = False) -> None:
        """Check that a folder is whole: every file's size, and the SHA-256 of all but the images.

        Args:
            folder: As `folder` gives it.
            images_too: Also the SHA-256 of the images; done once after they are made.

        Raises:
            UserError: It is missing, damaged, or of another layout; the message says what to run.
        """
        todo = f"Run `declip data prepare builtin:{self.name}` ({self.effort})."
        if not folder.is_dir():
            raise UserError(f"The built-in {self.name} are not there yet ('{folder}'). {todo}")
        if fault := self._fault(folder, images_too):
            raise UserError(f"The built-in {self.name} in '{folder}' cannot be used: {fault}. {todo}")

    def _fault(self, folder: Path, images_too: bool) -> str | None:
        """What is wrong with the folder, None when it is whole."""
        try:
            layout = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["layout"]
            if layout != self.layout:
                return "another version of declip made them"
            for name, (size, digest) in json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items():
                path, hashed = folder / name, images_too or not name.startswith(IMAGES)
                if path.stat().st_size != size or (hashed and sha256(path) != digest):
                    return f"{name} has changed"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        return None


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Pictures:
    """The pixels of a folder, mapped into memory and so shared by all processes.

    Args:
        folder: A folder that has been checked.
    """

    def __init__(self, folder: Path) -> None:
        side = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["side"]
        self._grey = _mapped(folder / GREY, (side, side))
        self._colour = _mapped(folder / COLOUR, (side, side, 3))

    def __getitem__(self, place: tuple[bool, int]) -> Image.Image:
        """The RGB picture at a place: whether it has colour, and its number among those."""
        coloured, index = place
        pixels = np.array((self._colour if coloured else self._grey)[index])
        return Image.fromarray(pixels).convert("RGB")


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not path.stat().st_size:
        return np.zeros((0, *shape), np.uint8)
    return np.memmap(path, np.uint8, mode="r").reshape(-1, *shape)


class PictureSource:
    """Pairs of a folder of pictures.

    Args:
        name: The source's name, "builtin:" included.
        folder: A folder that has been checked.
        rows: Rows of its table: "key", "coloured", "image", "captions", "keywords", and more.
    """

    def __init__(self, name: str, folder: Path, rows: Sequence[dict[str, Any]]) -> None:
        self.name = name
        self.rows = list(rows)
        self._pictures = Pictures(folder)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        image = self._pictures[row["coloured"], row["image"]]
        return Pair(row["key"], image, tuple(row["captions"]), tuple(row["keywords"]))

    def key(self, index: int) -> str:
        """The key of pair `index`, without its picture."""
        return self.rows[index]["key"]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of pair `index`."""
        return tuple(self.rows[index]["captions"])
