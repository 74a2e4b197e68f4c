"""Writing a folder of built-in pictures: pixels, the record of where they come from, checksums, a progress bar."""

import hashlib
import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from declip.data.picture_cache import CHECKSUMS, COLOUR, GREY, MANIFEST, NOTICE, TABLE, sha256
from declip.data.rendering import INVISIBLE


class PictureWriter:
    """Writes pictures one after the other, each once; used as a context.

    Written in order and not through a memory map: on a full disk a map dies of SIGBUS, this with a message.

    Args:
        folder: Where `images-grey.bin` and `images-colour.bin` go.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = ExitStack()
        self._counts = {False: 0, True: 0}
        self._seen: set[bytes] = set()

    def __enter__(self) -> "PictureWriter":
        names = {False: GREY, True: COLOUR}
        self._files = {c: self._open.enter_context((self._folder / n).open("wb")) for c, n in names.items()}
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, pixels: np.ndarray) -> tuple[bool, int] | str:
        """Write a picture.

        Args:
            pixels: uint8 (side, side, 3).

        Returns:
            Its place, as `Pictures` reads it; or why it was not written: "invisible" or "seen before".
        """
        if pixels.min() > INVISIBLE:
            return "invisible"
        digest = hashlib.sha256(pixels.tobytes()).digest()
        if digest in self._seen:
            return "seen before"
        self._seen.add(digest)
        coloured = bool((pixels != pixels[:, :, :1]).any())
        self._files[coloured].write((pixels if coloured else pixels[:, :, 0]).tobytes())
        self._counts[coloured] += 1
        return coloured, self._counts[coloured] - 1


PLACE = [("key", pa.string()), ("coloured", pa.bool_()), ("image", pa.int64())]
"""Columns of every table: a picture's name, and its place in the files of pixels."""

TEXT = [("captions", pa.list_(pa.string())), ("keywords", pa.list_(pa.string()))]
"""Further columns of every table."""


def write_pictures(
    folder: Path,
    pictures: Iterable[tuple[dict[str, Any], np.ndarray]],
    columns: Iterable[tuple[str, pa.DataType]],
    total: int,
    bar: Progress | None,
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Write pictures and their table.

    Args:
        folder: Where to; it is made.
        pictures: Each picture's row without its place, and its pixels.
        columns: The columns besides `PLACE` and `TEXT`.
        total: How many pictures there are, for the progress bar.
        bar: Progress bar to report to.

    Returns:
        The rows written, and how many pictures were not, by reason.
    """
    step = None if bar is None else bar.add_task("drawing", total=total)
    rows: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    folder.mkdir()
    with PictureWriter(folder) as writer:
        for row, pixels in pictures:
            place = writer.add(pixels)
            if isinstance(place, str):
                dropped[place] += 1
            else:
                rows.append({**row, "coloured": place[0], "image": place[1]})
            if bar is not None and step is not None:
                bar.advance(step)
    schema = pa.schema([*PLACE, *columns, *TEXT])
    pq.write_table(pa.Table.from_pylist(rows, schema), folder / TABLE)
    return rows, dropped


def write_record(folder: Path, manifest: Mapping[str, Any], notice: str) -> None:
    """Write what the pictures were made from, what to say wherever one is shown, and last all files' checksums."""
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    (folder / NOTICE).write_text(notice, encoding="utf-8")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sums = {path.relative_to(folder).as_posix(): [path.stat().st_size, sha256(path)] for path in files}
    (folder / CHECKSUMS).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def version_of(distribution: str) -> str:
    """Version of an installed Python package, empty when it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def progress_bar(shown: bool) -> Progress:
    """A progress bar on the error stream."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
