"""Make the stamps' cache: find or fetch the package, cut the margins off, and write everything once."""

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from rich.progress import Progress

from declip.data.debian import DebianPackage, Unpacked, unpacked
from declip.data.picture_build import progress_bar, write_pictures, write_record
from declip.data.rendering import fill_square
from declip.data.stamps import STAMPS
from declip.data.stamps_read import Stamp, read_stamps
from declip.errors import UserError
from declip.io.atomic import atomic_write

SIDE = 128
"""Pixels; half of the stamps are larger than 193."""

PACKAGE = DebianPackage("tuxpaint-stamps-default", "usr/share/tuxpaint/stamps", "81 MB")

COLUMNS = [
    ("name", pa.string()),
    ("kind", pa.string()),
    ("photo", pa.bool_()),
    ("test", pa.bool_()),
    ("licence", pa.string()),
]


def prepare_stamps(cache: str | Path | None = None, progress: bool = True) -> Path:
    """Find or fetch the stamps and keep them as pixels, unless a whole cache is there already.

    Args:
        cache: Folder of the cache; None for the usual one.
        progress: Show a progress bar.

    Returns:
        The folder that holds them.

    Raises:
        UserError: The package is nowhere and cannot be fetched, no room or no right to write.
    """
    folder = STAMPS.folder(cache)
    try:
        STAMPS.check(folder, images_too=True)
    except UserError:
        with progress_bar(progress) as bar:
            step = bar.add_task(f"looking for {PACKAGE.name}", total=None)
            with unpacked(PACKAGE) as package:
                bar.remove_task(step)
                build_stamps(package, folder, bar=bar)
    return folder


def build_stamps(package: Unpacked, folder: Path, bar: Progress | None = None) -> None:
    """Make the cache from the package's files; it appears whole or not at all.

    Args:
        package: The files.
        folder: What to make; what was there is replaced at the end.
        bar: Progress bar to report to.
    """
    stamps = read_stamps(package.data)
    with atomic_write(folder) as beside:
        rows, dropped = write_pictures(beside, _pictures(package.data, stamps), COLUMNS, len(stamps), bar)
        kept = beside / "licences" / PACKAGE.name
        kept.mkdir(parents=True)
        if package.notice:
            shutil.copyfile(package.notice, kept / "copyright")
        manifest = {
            "layout": STAMPS.layout,
            "side": SIDE,
            "pairs": len(rows),
            "photographs": sum(row["photo"] for row in rows),
            "names": len({row["name"] for row in rows if row["name"]}),
            "left_out": dict(dropped),
            "packages": {PACKAGE.name: package.version},
            "licence": "GPL-2",
        }
        write_record(beside, manifest, _notice(package, len(rows)))
        STAMPS.check(beside, images_too=True)


def _pictures(folder: Path, stamps: Iterable[Stamp]) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    for stamp in stamps:
        with Image.open(folder / f"{stamp.key}.png", formats=["PNG"]) as image:
            drawn = image.convert("RGBA")
        white = Image.new("RGBA", drawn.size, "white")
        pixels = fill_square(Image.alpha_composite(white, drawn).convert("RGB"), SIDE)
        yield _row(stamp), pixels


def _row(stamp: Stamp) -> dict[str, Any]:
    folders = stamp.key.split("/")[:-1]
    return {
        "key": stamp.key,
        "name": stamp.name,
        "kind": stamp.kind,
        "photo": stamp.photo,
        "test": stamp.test,
        "licence": "GPL-2",
        "captions": [stamp.sentence, *([stamp.name] if stamp.name else [])],
        "keywords": [folder.replace("_", " ") for folder in folders],
    }


def _notice(package: Unpacked, count: int) -> str:
    return (
        "The pictures in this folder belong to others. Show this wherever you show one.\n\n"
        f"{count} stamps of Tux Paint, Copyright 2002-2022 by Bill Kendrick and contributors,\n"
        f"from Debian's {PACKAGE.name} {package.version}; margins cut off, {SIDE} px over white.\n"
        "Licence: GPL-2, https://www.gnu.org/licenses/old-licenses/gpl-2.0.html\n"
        "The package's own notice is in licences/.\n"
    )
