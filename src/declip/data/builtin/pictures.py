"""Built-in sets on disk: drawings rendered to square images that they fill, over white, with a table of captions."""

import hashlib
import importlib.metadata
import json
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial, reduce
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageChops

from declip.data.builtin.fetch import DebianPackage, NpmPackages, Packages, read_json
from declip.data.pair import BUILTIN_PREFIX, Pair, PairSource
from declip.errors import UserError
from declip.io.atomic import atomic_write, cache_folder
from declip.io.pool import mapped
from declip.io.progress import status

OVERSIZE = 2  # drawn larger by this factor, so that cutting off the margins costs no sharpness
INVISIBLE = 250  # a drawing whose darkest value is above this is invisible on white, and is left out
DOTS_PER_INCH = 90  # the inch of editors of the 2000s; pages in millimeters come from them
DRAWN_AT_ONCE = 64  # drawings that a worker returns together
LONGEST_SIDE = 4096  # pixels; a drawing that takes less than a twentieth of its page stays a little blurred

TABLE, MANIFEST, NOTICE = "pairs.parquet", "manifest.json", "NOTICE.txt"
# Pixels of images without and with color, uint8, one after the other; gray ones take a third of the space.
GRAY, COLOR = "images-gray.bin", "images-color.bin"
ABOUT = """The images in this folder belong to others. Show the line of an image wherever you show it.
All were drawn at {} px over white, margins cut off. The notices are in licenses/."""

Row = dict[str, Any]  # of a set's table: "key", "captions" and columns of the set
# The rows that make a source, the column of their classes or None, and names: empty for the classes that occur.
Selection = tuple[list[Row], str | None, Sequence[str]]


def renderer() -> Callable[..., bytes]:
    """The SVG renderer, resvg."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError as error:
        raise UserError("resvg-py is needed once, to render the images: `pip install resvg-py`.") from error
    return svg_to_bytes


def draw(svg: str, side: int = 0) -> Image.Image:
    """Render an SVG document over white, at its own size or scaled to fit a square of `side` pixels."""
    size = {"width": side, "height": side, "dpi": DOTS_PER_INCH} if side else {}
    # Few drawings hold text, and looking through the system's fonts would take ten times as long as drawing.
    png = renderer()(svg_string=svg, background="#ffffff", skip_system_fonts=True, **size)
    with Image.open(BytesIO(bytes(png)), formats=["PNG"]) as image:
        return image.convert("RGB")


def rasterize_page(svg: str, side: int) -> np.ndarray:
    """Render a drawing that takes a part of its page only: drawn again, larger, when it comes out small."""
    page = draw(svg, OVERSIZE * side)
    left, top, right, bottom = _inked_box(page)
    longest = max(right - left, bottom - top)
    if longest < side:
        page = draw(svg, min(LONGEST_SIDE, max(page.size) * OVERSIZE * side // longest))
    return fill_square(page, side)


def fill_square(image: Image.Image, side: int) -> np.ndarray:
    """Cut off the white margins, of 1 to 35 %, and let the rest fill the square: uint8 (side, side, 3)."""
    part = image.crop(_inked_box(image))
    longest = max(part.size)
    square = Image.new("RGB", (longest, longest), "white")
    square.paste(part, ((longest - part.width) // 2, (longest - part.height) // 2))
    return np.asarray(square.resize((side, side), Image.Resampling.LANCZOS))


# The set that was read last: drawings are rendered set by set.
read_icons = lru_cache(maxsize=1)(read_json)


def draw_icon(file: Path, name: str, side: int) -> np.ndarray:
    """Render a drawing of a set of icons that fills the square, its shape kept: uint8 (side, side, 3)."""
    icons = read_icons(file)
    icon = {"left": 0, "top": 0, "width": 16, "height": 16} | icons | icons["icons"][name]
    page, box = OVERSIZE * side, " ".join(str(icon[key]) for key in ("left", "top", "width", "height"))
    names = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return fill_square(draw(f'<svg {names} width="{page}" height="{page}" viewBox="{box}">{icon["body"]}</svg>'), side)


def _inked_box(image: Image.Image) -> tuple[int, int, int, int]:
    darkest = reduce(ImageChops.darker, image.split())
    return darkest.point(lambda value: value <= INVISIBLE).getbbox() or (0, 0, *image.size)


class BuiltinSet(ABC):
    """An image set that is rendered once; a subclass chooses its drawings and the rows of each source."""

    name: ClassVar[str]  # of its folder in the cache, and after "builtin:" for `declip data download`
    layout: ClassVar[int]  # raised when the files change their meaning; a folder of another layout is built again
    effort: ClassVar[str]  # cost of making it, in a few words
    side: ClassVar[int]  # pixels of an image's sides
    packages: ClassVar[NpmPackages | DebianPackage]
    names_by: ClassVar[str] = ""  # whose the names are, where they are not the drawings' authors'
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
        """Whose the drawing of a row is, and its license."""

    @abstractmethod
    def select(self, split: str, table: list[Row]) -> Selection:
        """The rows of one of `splits`."""

    def folder(self, cache: str | Path | None = None) -> Path:
        """Folder of the set in a cache folder; None for the default one."""
        return (cache_folder() if cache is None else Path(cache).expanduser()) / self.name

    def download(self, cache: str | Path | None = None, progress: bool = True) -> Path:
        """Fetch and render the set, unless a complete folder is there already, and return that."""
        folder = self.folder(cache)
        try:
            self.read(folder)
        except UserError:
            renderer()  # an error before anything is fetched
            with ExitStack() as stack:
                with status(f"Fetching {self.name}", progress):
                    packages = stack.enter_context(self.packages.fetched())
                self.build(packages, folder, None, progress)
        return folder

    def build(self, packages: Packages, folder: Path, workers: int | None = 0, progress: bool = False) -> None:
        """Render unpacked packages into a folder, which appears whole or not at all; None workers: one per core."""
        rows = self.choose(packages)
        parts = [rows[start : start + DRAWN_AT_ONCE] for start in range(0, len(rows), DRAWN_AT_ONCE)]
        drawn = mapped(partial(self._render, packages), parts, workers, f"Drawing {self.name}" if progress else "")
        with atomic_write(folder) as unfinished:
            self.write(unfinished, zip(rows, chain.from_iterable(drawn), strict=True), packages)
            self.read(unfinished)

    def _render(self, packages: Packages, rows: list[Row]) -> list[np.ndarray | None]:
        return [self.pixels(row, packages) for row in rows]

    def write(self, folder: Path, drawings: Iterable[tuple[Row, np.ndarray | None]], packages: Packages) -> None:
        """Write the pixels, the table, the manifest and the notices of the packages."""
        folder.mkdir(parents=True)
        rows = self._draw(folder, drawings)
        pq.write_table(pa.Table.from_pylist(rows), folder / TABLE)
        (folder / MANIFEST).write_text(json.dumps({"layout": self.layout, "side": self.side}), encoding="utf-8")
        credits = [f"{credit}: {count} drawings" for credit, count in Counter(map(self.credit, rows)).items()]
        made_of = [f"{name} {package.version}" for name, package in packages.items()]
        made_of.append(f"Drawn by resvg-py {importlib.metadata.version('resvg-py')}")
        notice = [ABOUT.format(self.side), "", *credits, self.names_by, "", *made_of, ""]
        (folder / NOTICE).write_text("\n".join(notice), encoding="utf-8")
        for name, package in packages.items():
            licenses = folder / "licenses" / name.replace("/", "-")
            licenses.mkdir(parents=True)
            for path in package.notices:
                shutil.copy(path, licenses)

    def _draw(self, folder: Path, drawings: Iterable[tuple[Row, np.ndarray | None]]) -> list[Row]:
        """Write the pixels, and return the rows of the drawings that are visible and not seen before."""
        rows, seen, counts = list[Row](), set[bytes](), [0, 0]
        # Written in order and not through a memory map: on a full disk a map dies of SIGBUS, this with a message.
        with (folder / GRAY).open("wb") as gray, (folder / COLOR).open("wb") as color:
            for row, pixels in drawings:
                digest = b"" if pixels is None else hashlib.sha256(pixels.tobytes()).digest()
                if pixels is None or pixels.min() > INVISIBLE or (digest in seen and not self.keeps_repeated):
                    continue
                seen.add(digest)
                colored = bool((pixels != pixels[:, :, :1]).any())
                (color if colored else gray).write((pixels if colored else pixels[:, :, 0]).tobytes())
                rows.append({**row, "colored": colored, "image": counts[colored]})
                counts[colored] += 1
        return rows

    def read(self, folder: Path) -> tuple[list[Row], list[np.ndarray]]:
        """Read the table, and map the gray and the colored images, (n, side, side) and (m, side, side, 3) uint8."""
        try:
            if json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["layout"] != self.layout:
                raise ValueError("another version of declip made them")
            rows, side = pq.read_table(folder / TABLE).to_pylist(), self.side
            images = [_mapped(folder / GRAY, (side, side)), _mapped(folder / COLOR, (side, side, 3))]
            colored = sum(row["colored"] for row in rows)
            if [*map(len, images)] != [len(rows) - colored, colored]:
                raise ValueError("images are missing")
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            fault = f"cannot be used: {error}" if folder.is_dir() else "are not there yet"
            remedy = f"Run `declip data download {BUILTIN_PREFIX}{self.name}` ({self.effort})."
            raise UserError(f"The built-in {self.name} in '{folder}' {fault}. {remedy}") from error
        return rows, images


class BuiltinSource(PairSource):
    """Pairs of a built-in set; splits for measuring have classes."""

    def __init__(self, origin: BuiltinSet, split: str, cache: str | Path | None = None) -> None:
        self._arguments = (origin, split, cache)
        self.name = BUILTIN_PREFIX + split
        table, self._images = origin.read(origin.folder(cache))
        self.rows, column, names = origin.select(split, table)
        self.credit = "; ".join(dict.fromkeys(map(origin.credit, self.rows)))
        if column:
            self.class_names = tuple(names or sorted({row[column] for row in self.rows}))
            numbers = {name: number for number, name in enumerate(self.class_names)}
            self.labels = np.array([numbers[row[column]] for row in self.rows], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Pair:
        row = self.rows[index]
        image = Image.fromarray(np.array(self._images[row["colored"]][row["image"]])).convert("RGB")
        return Pair(row["key"], image, tuple(row["captions"]))

    def key(self, index: int) -> str:
        return self.rows[index]["key"]

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(self.rows[index]["captions"])

    def __reduce__(self) -> tuple[type["BuiltinSource"], tuple[object, ...]]:
        return type(self), self._arguments  # the images stay in the file, shared by all processes


def _mapped(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    if not path.stat().st_size:
        return np.zeros((0, *shape), np.uint8)
    return np.memmap(path, np.uint8, mode="r").reshape(-1, *shape)
