"""Predictions of `declip.classify`, written to a table or to a folder of images for each class."""

import csv
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from declip.data.exclude import FORMULA
from declip.data.images.decode import EXTENSIONS
from declip.data.pair import Origin
from declip.data.sources.image_source import ImageSource
from declip.errors import UserError
from declip.io.atomic import atomic_write

OTHER_TABLES = (".json", ".jsonl", ".tsv", ".txt", ".parquet", ".xlsx")  # refused: nobody calls a folder so
TABLE = "predictions.csv"  # in a folder of images by class
ELSEWHERE = "choose another path with --out"
UNUSABLE = re.compile(r'[\x00-\x1f/\\:*?"<>|\ud800-\udfff]')  # in file names, on one system or another
LONGEST_NAME = 60  # characters, at most four bytes each, of the 255 bytes that a name may have


@dataclass(frozen=True)
class Prediction:
    """An image's class: the most probable one, and the probability of each."""

    image: str  # its key
    best: str
    probability: float
    probabilities: dict[str, float]


Write = Callable[[Prediction, int, Origin], None]
"""Writes the prediction of an image with its place in the source and its origin."""


def check_out(out: Path | None) -> None:
    """Refuse a path that predictions cannot be written to, before anything is computed."""
    suffix = "" if out is None else out.suffix.lower()
    if suffix in OTHER_TABLES:
        raise UserError(f"Predictions are written to .csv, or sorted into a folder, not to '{out}'.")
    if out is not None and out.is_dir() and (any(out.iterdir()) or suffix == ".csv"):
        raise UserError(f"'{out}' is a folder that is not empty; {ELSEWHERE}: a new folder, or a .csv file.")
    if out is not None and out.is_file() and suffix != ".csv":
        raise UserError(f"'{out}' is a file; {ELSEWHERE}: a new folder, or a .csv file.")


@contextmanager
def open_predictions(out: Path | None, classes: Sequence[str], source: ImageSource) -> Iterator[Write]:
    """Open a table or a folder, which appears when all predictions are written; None writes nothing."""
    if out is None:
        yield lambda prediction, place, origin: None
        return
    with atomic_write(out, ELSEWHERE) as target:
        sorts = out.suffix.lower() != ".csv"
        folders = _class_folders(target, classes) if sorts else {}
        taken = Counter[Path]()
        with (target / TABLE if sorts else target).open(
            "w", newline="", encoding="utf-8", errors="backslashreplace"
        ) as file:
            table = csv.writer(file)
            table.writerow(["image", "class", "probability", *map(_plain, classes)])

            def write(prediction: Prediction, place: int, origin: Origin) -> None:
                numbers = (f"{number:.6g}" for number in (prediction.probability, *prediction.probabilities.values()))
                table.writerow([_plain(prediction.image), _plain(prediction.best), *numbers])
                if sorts:
                    _copy(source, place, origin, folders[prediction.best] / Path(prediction.image).name, taken)

            yield write


def _class_folders(target: Path, classes: Sequence[str]) -> dict[str, Path]:
    """Make a folder for each class; those of classes with the same file name get numbers."""
    names = list(map(_file_name, classes))
    count = Counter([TABLE, *(name.lower() for name in names)])  # some file systems ignore case
    folders = dict[str, Path]()
    for number, (label, name) in enumerate(zip(classes, names, strict=True)):
        while count[name.lower()] > 1:
            name = f"{name} {number}"
            count[name.lower()] += 1
        folders[label] = target / name
        folders[label].mkdir(parents=True)
    return folders


def _copy(source: ImageSource, place: int, origin: Origin, target: Path, taken: Counter[Path]) -> None:
    """Copy an image to a path, or one with a number if that exists; one without a file of its own is saved as PNG."""
    file = Path(source.source.origin(place).path)  # `origin.path` has "?" for what is not Unicode
    has_file = bool(origin.path) and not origin.offset and file.suffix.lower() in EXTENSIONS
    first = target = target.with_name(_file_name(target.name) + ("" if has_file else ".png"))
    while os.path.lexists(target):
        taken[first] += 1
        target = first.with_name(f"{taken[first]} {first.name}")
    if has_file:
        shutil.copyfile(file, target)
    else:
        source[place].image.save(target, "PNG")


def _plain(cell: str) -> str:
    """A cell that a spreadsheet does not compute as a formula."""
    return f"'{cell}" if FORMULA.match(cell) else cell


def _file_name(text: str) -> str:
    return UNUSABLE.sub("_", text)[-LONGEST_NAME:].strip(". ") or "_"
