"""Make the clip art's cache: find or fetch the package, draw, and write everything once."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.progress import Progress

from declip.data.clipart import CLIPART
from declip.data.clipart_read import Drawing, read_clipart
from declip.data.debian import DebianPackage, Unpacked, unpacked
from declip.data.picture_build import progress_bar, version_of, write_pictures, write_record
from declip.data.rendering import DrawWithin, page_drawer, rasterise_page
from declip.errors import UserError
from declip.io.atomic import atomic_write

SIDE = 96
"""Pixels, as the emoji have."""

PACKAGE = DebianPackage("openclipart-svg", "usr/share/openclipart/svg", "25 MB")

COLUMNS = [(name, pa.string()) for name in ("title", "category", "author", "licence")]


def prepare_clipart(cache: str | Path | None = None, progress: bool = True) -> Path:
    """Find or fetch the drawings and keep them as pixels, unless a whole cache is there already.

    Args:
        cache: Folder of the cache; None for the usual one.
        progress: Show a progress bar.

    Returns:
        The folder that holds them.

    Raises:
        UserError: The package is nowhere and cannot be fetched, no resvg-py, no room or no right to write.
    """
    folder = CLIPART.folder(cache)
    try:
        CLIPART.check(folder, images_too=True)
    except UserError:
        draw = page_drawer()
        with progress_bar(progress) as bar:
            step = bar.add_task(f"looking for {PACKAGE.name}", total=None)
            with unpacked(PACKAGE) as package:
                bar.remove_task(step)
                build_clipart(package, folder, draw, bar=bar)
    return folder


def build_clipart(package: Unpacked, folder: Path, draw: DrawWithin, bar: Progress | None = None) -> None:
    """Make the cache from the package's files; it appears whole or not at all.

    Args:
        package: The files.
        folder: What to make; what was there is replaced at the end.
        draw: From SVG to PNG.
        bar: Progress bar to report to.
    """
    drawings = read_clipart(package.data)
    broken: list[str] = []
    with atomic_write(folder) as beside:
        pictures = _pictures(package.data, drawings, draw, broken)
        rows, dropped = write_pictures(beside, pictures, COLUMNS, len(drawings), bar)
        kept = beside / "licences" / PACKAGE.name
        kept.mkdir(parents=True)
        if package.notice:
            shutil.copyfile(package.notice, kept / "copyright")
        manifest = {
            "layout": CLIPART.layout,
            "side": SIDE,
            "pairs": len(rows),
            "titles": len({row["title"] for row in rows}),
            "left_out": {**dropped, "cannot be drawn": broken},
            "packages": {PACKAGE.name: package.version},
            "licence": "public domain",
            "resvg_py": version_of("resvg-py"),
        }
        write_record(beside, manifest, _notice(package, len(rows)))
        CLIPART.check(beside, images_too=True)


def _pictures(
    folder: Path, drawings: Iterable[Drawing], draw: DrawWithin, broken: list[str]
) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    for drawing in drawings:
        try:
            pixels = rasterise_page((folder / drawing.key).read_text(encoding="utf-8"), draw, SIDE)
        except ValueError:
            broken.append(drawing.key)
            continue
        yield _row(drawing), pixels


def _row(drawing: Drawing) -> dict[str, Any]:
    return {
        "key": drawing.key,
        "title": drawing.title,
        "category": drawing.category,
        "author": drawing.author,
        "licence": "public domain",
        "captions": [drawing.title],
        "keywords": [word for word in drawing.keywords if word != drawing.title],
    }


def _notice(package: Unpacked, count: int) -> str:
    return (
        f"{count} drawings of the Open Clip Art Library, by the authors that the table names, dedicated to the\n"
        f"public domain; from Debian's {PACKAGE.name} {package.version}, drawn at {SIDE} px over white,\n"
        "margins cut off. "
        "The package's own notice is in licences/.\n"
    )
