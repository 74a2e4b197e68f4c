"""Built-in image sets: one builder that renders a set into a checked cache folder, and the source that maps it."""

import hashlib
import importlib.metadata
import json
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from declip.data.builtin.fetch import DebianPackage, NpmPackages, Packages
from declip.data.builtin.render import INVISIBLE, renderer
from declip.data.pair import BUILTIN_PREFIX, Pair
from declip.errors import UserError
from declip.io.atomic import atomic_write, cache_folder

TABLE, MANIFEST, CHECKSUMS, NOTICE = "pairs.parquet", "manifest.json", "checksums.json", "NOTICE.txt"
IMAGES = "images"
"""Beginning of the names of the files that hold pixels."""

GRAY, COLOR = f"{IMAGES}-grey.bin", f"{IMAGES}-colour.bin"
"""Pixels of images without and with color, uint8, one after the other; gray ones take a third of the room."""

Row = dict[str, Any]
"""A row of a set's table: "key", "captions", "keywords" and the set's own columns."""


class Selection(NamedTuple):
    """The part of a set's table that a source is about."""

    rows: list[Row]
    credit: str
    class_column: str | None = None
    """Column that holds a pair's class; None for a source without classes."""
    class_names: Sequence[str] = ()
    """Empty for the classes that occur, in alphabetical order."""


class BuiltinSet(ABC):
    """An image set that is rendered once; a subclass says how its drawings are chosen and what of them is a source."""

    name: ClassVar[str]
    """Name of its folder below the cache, and the name after "builtin:" that `declip data prepare` takes."""
    layout: ClassVar[int]
    """Raised when the files change their meaning; a folder of another layout is built anew."""
    effort: ClassVar[str]
    """Cost of making it, in a few words."""
    side: ClassVar[int]
    """Pixels."""
    packages: ClassVar[NpmPackages | DebianPackage]
    splits: ClassVar[Collection[str]]
    """Names of its sources."""
    needs_renderer: ClassVar[bool] = True
    keeps_repeated: ClassVar[bool] = False
    """Whether an image may occur twice."""

    @abstractmethod
    def choose(self, packages: Packages) -> list[Row]:
        """Rows of all drawings that the set should have, in order."""

    @abstractmethod
    def pixels(self, row: Row, packages: Packages) -> np.ndarray | None:
        """Render the drawing of a row: (side, side, 3) uint8, None where it is broken."""

    @abstractmethod
    def notice(self, packages: Packages, rows: list[Row]) -> str:
        """The text to show with the images: whose they are, and their licenses."""

    @abstractmethod
    def select(self, split: str, table: list[Row]) -> Selection:
        """The part of the table that is one of `splits`."""

    def folder(self, cache: str | Path | None = None) -> Path:
        """Folder of the set in a cache folder; None for the default one."""
        return (cache_folder() if cache is None else Path(cache).expanduser()) / self.name

    def open(self, split: str, cache: str | Path | None = None) -> "BuiltinSource":
        """Open one of `splits`."""
        return BuiltinSource(self, split, cache)

    def prepare(self, cache: str | Path | None = None, progress: bool = True) -> Path:
        """Fetch and render the set, unless a whole folder is there already, and return that.

        Raises:
            UserError: The packages cannot be fetched, a tool is missing, or the folder cannot be written.
        """
        folder = self.folder(cache)
        try:
            self.check(folder, images_too=True)
        except UserError:
            if self.needs_renderer:
                renderer()  # an error before anything is fetched
            with progress_bar(progress) as bar:
                step = bar.add_task(str(self.packages), total=None)
                with self.packages.fetched() as packages:
                    bar.remove_task(step)
                    self.build(packages, folder, bar)
        return folder

    def build(self, packages: Packages, folder: Path, bar: Progress | None = None) -> None:
        """Render unpacked packages into a folder, which appears whole or not at all."""
        chosen = self.choose(packages)
        shown = chosen if bar is None else bar.track(chosen, description="drawing")
        with atomic_write(folder) as beside:
            rows, dropped = self.write(beside, ((row, self.pixels(row, packages)) for row in shown))
            for name, package in packages.items():
                kept = beside / "licences" / name.replace("/", "-")
                kept.mkdir(parents=True)
                for path in package.notices:
                    shutil.copyfile(path, kept / path.name)
            manifest = {
                "side": self.side,
                "pairs": len(rows),
                "left_out": dropped,
                "packages": {name: package.version for name, package in packages.items()},
                "resvg_py": importlib.metadata.version("resvg-py") if self.needs_renderer else None,
            }
            self.seal(beside, manifest, self.notice(packages, rows))
            self.check(beside, images_too=True)

    def write(self, folder: Path, drawings: Iterable[tuple[Row, np.ndarray | None]]) -> tuple[list[Row], Counter[str]]:
        """Write the pixels and the table; return the rows written, and how many were not, by reason."""
        rows: list[Row] = []
        dropped: Counter[str] = Counter()
        seen: set[bytes] = set()
        counts = [0, 0]
        folder.mkdir(parents=True)
        # Written in order and not through a memory map: on a full disk a map dies of SIGBUS, this with a message.
        with (folder / GRAY).open("wb") as gray, (folder / COLOR).open("wb") as color:
            for row, pixels in drawings:
                if pixels is None or pixels.min() > INVISIBLE:
                    dropped["cannot be drawn" if pixels is None else "invisible"] += 1
                    continue
                digest = hashlib.sha256(pixels.tobytes()).digest()
                if digest in seen and not self.keeps_repeated:
                    dropped["seen before"] += 1
                    continue
                seen.add(digest)
                colored = bool((pixels != pixels[:, :, :1]).any())
                (color if colored else gray).write((pixels if colored else pixels[:, :, 0]).tobytes())
                rows.append({**row, "coloured": colored, "image": counts[colored]})
                counts[colored] += 1
        pq.write_table(pa.Table.from_pylist(rows), folder / TABLE)
        return rows, dropped

    def seal(self, folder: Path, manifest: Mapping[str, Any], notice: str) -> None:
        """Write the manifest, the notice and last all files' checksums."""
        text = json.dumps({"layout": self.layout, **manifest}, indent=1)
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        (folder / NOTICE).write_text(notice, encoding="utf-8")
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        sums = {path.relative_to(folder).as_posix(): [path.stat().st_size, sha256(path)] for path in files}
        (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")

    def check(self, folder: Path, images_too: bool = False) -> None:
        """Check that a folder is whole: every file's size, and the SHA-256 of all but the images.

        Args:
            folder: Folder of the set.
            images_too: Also the SHA-256 of the images; done once after they are made.

        Raises:
            UserError: It is missing, damaged, or of another layout; the message says what to run.
        """
        todo = f"Run `declip data prepare {BUILTIN_PREFIX}{self.name}` ({self.effort})."
        if not folder.is_dir():
            raise UserError(f"The built-in {self.name} are not there yet ('{folder}'). {todo}")
        if fault := self._fault(folder, images_too):
            raise UserError(f"The built-in {self.name} in '{folder}' cannot be used: {fault}. {todo}")

    def _fault(self, folder: Path, images_too: bool) -> str | None:
        try:
            if json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["layout"] != self.layout:
                return "another version of declip made them"
            for name, (size, digest) in json.loads((folder / CHECKSUMS).read_text(encoding="utf-8")).items():
                path, hashed = folder / name, images_too or not name.startswith(IMAGES)
                if path.stat().st_size != size or (hashed and sha256(path) != digest):
                    return f"{name} has changed"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return f"{type(error).__name__}: {error}"
        return None


class BuiltinSource:
    """Pairs of a built-in set.

    Attributes:
        credit: Sentence that the licenses ask for wherever an image is shown.
        labels: int64 (n,), the class of each pair; only of a split with classes.
        class_names: Names of the classes; only of a split with classes.

    Raises:
        UserError: The set's folder is missing, damaged or of another layout.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]

    def __init__(self, origin: BuiltinSet, split: str, cache: str | Path | None = None) -> None:
        self._arguments = (origin, split, cache)
        self.name = BUILTIN_PREFIX + split
        folder = origin.folder(cache)
        origin.check(folder)
        self.rows, self.credit, column, names = origin.select(split, pq.read_table(folder / TABLE).to_pylist())
        if column:
            self.class_names = tuple(names or sorted({row[column] for row in self.rows}))
            numbers = {name: number for number, name in enumerate(self.class_names)}
            self.labels = np.array([numbers[row[column]] for row in self.rows], dtype=np.int64)
        side = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["side"]
        self._pixels = _mapped(folder / GRAY, (side, side)), _mapped(folder / COLOR, (side, side, 3))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        pixels = np.array(self._pixels[row["coloured"]][row["image"]])
        return Pair(row["key"], Image.fromarray(pixels).convert("RGB"), tuple(row["captions"]), tuple(row["keywords"]))

    def key(self, index: int) -> str:
        """The key of pair `index`, without its image."""
        return self.rows[index]["key"]

    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of pair `index`, the name first."""
        return tuple(self.rows[index]["captions"])

    def __reduce__(self) -> tuple[type["BuiltinSource"], tuple[object, ...]]:
        """Pickle the arguments alone: the images stay in the file, shared by all processes."""
        return type(self), self._arguments


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def progress_bar(shown: bool) -> Progress:
    """A progress bar on the error stream."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not path.stat().st_size:
        return np.zeros((0, *shape), np.uint8)
    return np.memmap(path, np.uint8, mode="r").reshape(-1, *shape)
