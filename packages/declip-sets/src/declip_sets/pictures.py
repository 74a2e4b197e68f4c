"""Built-in sets on disk: a table of captions, the pixels of the images, and the licenses."""

import hashlib
import importlib.metadata
import json
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from declip.data.pair import LazyImage, OnDemand, Pair, PairSource
from declip.errors import UserError
from declip.io.atomic import atomic_write, cache_folder
from declip.io.pool import parallel_map
from declip.io.progress import status
from declip_sets.drawing import INVISIBLE, renderer
from declip_sets.fetch import DebianPackage, NpmPackages, Packages

PREFIX = "builtin:"
DRAWN_AT_ONCE = 64  # drawings that a worker returns together

TABLE, MANIFEST, NOTICE = "pairs.parquet", "manifest.json", "NOTICE.txt"
# Pixels of images without and with color, uint8, one after the other; gray ones take a third.
GRAY, COLOR = "images-gray.bin", "images-color.bin"
ABOUT = (
    "The images in this folder belong to others. "
    "Show the line of an image wherever you show it.\n"
    "All were drawn at {} px over white, margins cut off. The notices are in licenses/."
)

Cache = str | Path | None  # a cache folder; None: the default one
Row = dict[str, Any]  # of a set's table: "key", "captions" and columns of the set
Drawing = tuple[Row, np.ndarray | None]


class Selection(NamedTuple):
    """The rows that make a source, and their classes."""

    rows: list[Row]
    column: str | None = None  # of the class; None: no classes
    names: Sequence[str] = ()  # of the classes; empty: those that occur


class BuiltinSet(ABC):
    """An image set that is rendered once; a subclass selects its drawings and their rows."""

    name: ClassVar[str]  # of its folder in the cache, and after "builtin:" in `data download`
    layout: ClassVar[int]  # raised when the files change their meaning; others are built again
    effort: ClassVar[str]  # cost of making it, in a few words
    side: ClassVar[int]  # pixels of an image's sides
    packages: ClassVar[NpmPackages | DebianPackage]
    names_by: ClassVar[str] = ""  # authors of the names, where the drawings' did not write them
    splits: ClassVar[Collection[str]]  # names of its sources
    keeps_repeated: ClassVar[bool] = False  # whether an image may occur twice

    @abstractmethod
    def choose(self, packages: Packages) -> list[Row]:
        """Rows of all drawings of the set, in order."""

    @abstractmethod
    def pixels(self, row: Row, packages: Packages) -> np.ndarray | None:
        """Render the drawing of a row: (side, side, 3) uint8, None where it is broken."""

    @abstractmethod
    def credit(self, row: Row) -> str:
        """The author of a row's drawing, and its license."""

    @abstractmethod
    def select(self, split: str, table: list[Row]) -> Selection:
        """The rows of one of `splits`."""

    def other_splits(self, split: str) -> Mapping[str, str]:
        """Sources with the other splits of a dataset, such as {"train": NAME}."""
        return {}

    def folder(self, cache: Cache = None) -> Path:
        """Folder of the set in a cache folder."""
        if cache is None:
            return cache_folder() / self.name
        return Path(cache).expanduser() / self.name

    def download(self, cache: Cache = None, progress: bool = True) -> Path:
        """Fetch and render the set, unless a complete folder exists, and return the folder."""
        folder = self.folder(cache)
        try:
            self.read(folder)
        except UserError:
            renderer()  # an error before anything is fetched
            self._fetch_and_build(folder, progress)
        return folder

    def _fetch_and_build(self, folder: Path, progress: bool) -> None:
        with ExitStack() as stack:
            with status(f"Fetching {self.name}", progress):
                packages = stack.enter_context(self.packages.fetched())
            self.build(packages, folder, None, progress)

    def build(
        self,
        packages: Packages,
        folder: Path,
        workers: int | None = 0,
        progress: bool = False,
    ) -> None:
        """Render unpacked packages into a folder, which appears complete or not at all.

        Args:
            workers: Worker processes; None: one per core.
        """
        rows = self.choose(packages)
        starts = range(0, len(rows), DRAWN_AT_ONCE)
        parts = [rows[start : start + DRAWN_AT_ONCE] for start in starts]
        title = f"Drawing {self.name}" if progress else ""
        rendered = parallel_map(partial(self._render, packages), parts, workers, title)
        pixels = chain.from_iterable(rendered)
        with atomic_write(folder) as unfinished:
            self.write(unfinished, zip(rows, pixels, strict=True), packages)
            self.read(unfinished)

    def _render(self, packages: Packages, rows: list[Row]) -> list[np.ndarray | None]:
        return [self.pixels(row, packages) for row in rows]

    def write(self, folder: Path, drawings: Iterable[Drawing], packages: Packages) -> None:
        """Write the pixels, the table, the manifest and the notices of the packages."""
        folder.mkdir(parents=True)
        rows = self._write_pixels(folder, drawings)
        pq.write_table(pa.Table.from_pylist(rows), folder / TABLE)
        manifest = json.dumps({"layout": self.layout, "side": self.side})
        (folder / MANIFEST).write_text(manifest, encoding="utf-8")
        notice = "\n".join(self._notice(rows, packages))
        (folder / NOTICE).write_text(notice, encoding="utf-8")
        for name, package in packages.items():
            licenses = folder / "licenses" / name.replace("/", "-")
            licenses.mkdir(parents=True)
            for path in package.notices:
                shutil.copy(path, licenses)

    def _notice(self, rows: list[Row], packages: Packages) -> list[str]:
        """Lines that name the authors of the drawings, and what the set was made of."""
        lines = [ABOUT.format(self.side), ""]
        counts = Counter(self.credit(row) for row in rows)
        for credit, count in counts.items():
            lines.append(f"{credit}: {count} drawings")
        lines += [self.names_by, ""]
        for name, package in packages.items():
            lines.append(f"{name} {package.version}")
        renderer_version = importlib.metadata.version("resvg-py")
        lines += [f"Drawn by resvg-py {renderer_version}", ""]
        return lines

    def _write_pixels(self, folder: Path, drawings: Iterable[Drawing]) -> list[Row]:
        """Write the pixels; returns the rows of drawings that are visible and not repeated."""
        rows: list[Row] = []
        seen: set[bytes] = set()
        written = {False: 0, True: 0}  # images without and with color
        # Not through a memory map: on a full disk that dies of SIGBUS, this with a message.
        with (folder / GRAY).open("wb") as gray, (folder / COLOR).open("wb") as color:
            for row, pixels in drawings:
                if pixels is None or pixels.min() > INVISIBLE:
                    continue
                digest = hashlib.sha256(pixels.tobytes()).digest()
                if digest in seen and not self.keeps_repeated:
                    continue
                seen.add(digest)
                first_channel = pixels[:, :, :1]
                colored = bool((pixels != first_channel).any())
                if colored:
                    color.write(pixels.tobytes())
                else:
                    gray.write(first_channel.tobytes())
                rows.append({**row, "colored": colored, "image": written[colored]})
                written[colored] += 1
        return rows

    def read(self, folder: Path) -> tuple[list[Row], list[np.ndarray]]:
        """Read the table, and map the images.

        Returns:
            The rows; the gray images (n, side, side) and those in color (m, side, side, 3), uint8.
        """
        try:
            self._check_layout(folder)
            rows = pq.read_table(folder / TABLE).to_pylist()
            gray = _map(folder / GRAY, (self.side, self.side))
            color = _map(folder / COLOR, (self.side, self.side, 3))
            colored = sum(row["colored"] for row in rows)
            if len(color) != colored or len(gray) != len(rows) - colored:
                raise ValueError("images are missing")
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            fault = f"cannot be used: {error}" if folder.is_dir() else "are not there yet"
            remedy = f"Run `declip data download {PREFIX}{self.name}` ({self.effort})."
            raise UserError(f"The built-in {self.name} in '{folder}' {fault}. {remedy}") from error
        return rows, [gray, color]

    def _check_layout(self, folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["layout"] != self.layout:
            raise ValueError("another version of declip made them")


class BuiltinSource(PairSource):
    """Pairs of a built-in set; splits for measuring have classes."""

    def __init__(self, origin: BuiltinSet, split: str, cache: Cache = None) -> None:
        self._arguments = (origin, split, cache)
        self.name = PREFIX + split
        table, self._images = origin.read(origin.folder(cache))
        selection = origin.select(split, table)
        self.rows = selection.rows
        texts = [name for name, cell in self.rows[0].items() if isinstance(cell, str)]
        self.cells = OnDemand({name: partial(self._texts, name) for name in texts})
        credits = dict.fromkeys(origin.credit(row) for row in self.rows)
        self.credit = "; ".join(credits)
        if selection.column:
            self._read_classes(selection.column, selection.names)
        others = origin.other_splits(split)
        self.other_splits = {}
        for which, name in others.items():
            self.other_splits[which] = partial(BuiltinSource, origin, name, cache)

    def _read_classes(self, column: str, names: Sequence[str]) -> None:
        classes = [row[column] for row in self.rows]
        self.class_names = tuple(names or sorted(set(classes)))
        number_of = {name: number for number, name in enumerate(self.class_names)}
        labels = [number_of[name] for name in classes]
        self.columns = {"label": np.array(labels, dtype=np.int64)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        return Pair(row["key"], partial(tuple, row["captions"]), partial(self._image, row))

    def _image(self, row: Row) -> LazyImage:
        images = self._images[row["colored"]]
        pixels = np.array(images[row["image"]])
        return LazyImage(Image.fromarray(pixels).convert("RGB"))

    def _texts(self, name: str) -> list[tuple[str, ...]]:
        return [(row[name],) for row in self.rows]

    def __reduce__(self) -> tuple[type["BuiltinSource"], tuple[object, ...]]:
        return type(self), self._arguments  # the images stay in the file, shared by processes


def _map(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Map a file of images of this shape into memory; an empty file cannot be mapped."""
    if not path.stat().st_size:
        return np.zeros((0, *shape), np.uint8)
    return np.memmap(path, np.uint8, mode="r").reshape(-1, *shape)
