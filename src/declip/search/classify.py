"""Classify images: a probability of each class that the user names, streamed to a table or to folders by class."""

import csv
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from glob import glob
from itertools import chain, repeat
from pathlib import Path

import torch

from declip.data.columns import DEFAULT, Columns
from declip.data.exclude import FORMULA
from declip.data.images.decode import EXTENSIONS
from declip.data.pair import Origin, PairSource, SkipCounter
from declip.data.sources.image_source import ImageSource, open_images
from declip.data.sources.open import open_source
from declip.data.sources.python_items import Items
from declip.errors import UserError, check_range
from declip.evaluation.encode import Batches, Encoder
from declip.evaluation.zero_shot import class_features, logit_scale, read_templates
from declip.interchange.read import load
from declip.io.atomic import atomic_write
from declip.io.pool import in_order, naming_lost_workers, pairs_bar
from declip.search.embed import read_row
from declip.search.index import image_vectors

TABLES = (".csv", ".json")
OTHER_TABLES = (".jsonl", ".tsv", ".txt", ".parquet", ".xlsx")  # no names that one gives a folder
TABLE = "predictions.csv"  # in a folder of images by class
ELSEWHERE = "choose another place with --out"
UNUSABLE = re.compile(r'[\x00-\x1f/\\:*?"<>|\ud800-\udfff]')  # in the names of files, on one system or another
LONGEST_NAME = 60  # characters, at most four bytes each, of the 255 bytes that a name may have


@dataclass(frozen=True)
class Prediction:
    """An image's class: the most probable one, and the probability of each."""

    image: str  # its key
    best: str
    probability: float
    probabilities: dict[str, float]


@dataclass
class Classification:
    """The classes of a source's images; `predictions` is empty where they were written, or handed over one by one."""

    counts: dict[str, int]  # images of each class
    skipped: SkipCounter = field(default_factory=SkipCounter)
    predictions: list[Prediction] = field(default_factory=list)

    def summary(self) -> str:
        """One line for the classes, the most frequent first, and one for each reason of images left out."""
        counts = sorted(((count, name) for name, count in self.counts.items() if count), key=lambda row: -row[0])
        classes = ", ".join(f"{count:,} {name}" for count, name in counts[:20]) + (", …" if len(counts) > 20 else "")
        total = sum(self.counts.values())
        return "\n".join([f"{total:,} images: {classes}", *(f"Left out: {line}" for line in self.skipped.lines())])


Take = Callable[[Prediction, int, Origin], object]  # a prediction with the image's place in the source and its origin


def classify(
    model: str | Path | Encoder,
    images: str | Path | PairSource | Items,
    classes: str | Path | Sequence[str],
    *,
    templates: str | Sequence[str] = "plain",
    out: str | Path | None = None,
    link: bool = False,
    batch_size: int = 256,
    workers: int = 0,
    columns: Columns = DEFAULT,
    device: str = "auto",
    progress: bool = False,
    on_prediction: Callable[[Prediction], object] | None = None,
) -> Classification:
    """Classify images among classes by their names; memory does not grow with the images where `out` is given.

    Probabilities are the softmax of the logit scale times the cosines, as in CLIP's zero-shot classification.

    Args:
        images: A folder, a file, a pattern such as "photos/*.jpg", or any source; images need no captions.
        classes: Names, a file with one a line, or names separated by commas.
        templates: A shipped template set, or sentences with ``{}`` for the class.
        out: A .csv or .json file with all probabilities, or a new folder, which gets a folder of images for each class
            and predictions.csv.
        link: Make links in these folders instead of copies; an image that is in no file of its own is a copy, as PNG.
        on_prediction: Called with each prediction, in the order of the images.

    Raises:
        UserError: Fewer than two classes, no image can be used, a folder that is not empty, or a model without text.
    """
    check_range("batch_size", batch_size, 1)
    names, prompts = read_classes(classes), read_templates(templates)[1]
    source = _open(images, replace(columns, caption=None))
    out = None if out is None else Path(out).expanduser()
    if out is not None and out.suffix.lower() in OTHER_TABLES:
        raise UserError(f"Predictions are written to {' or '.join(TABLES)}, or sorted into a folder, not to '{out}'.")
    if out is not None and out.is_dir() and (any(out.iterdir()) or out.suffix in TABLES):
        raise UserError(f"'{out}' is a folder that is not empty; {ELSEWHERE}: a new folder, or a .csv or .json file.")
    if out is not None and out.is_file() and out.suffix.lower() not in TABLES:
        raise UserError(f"'{out}' is a file; {ELSEWHERE}: a new folder, or a .csv or .json file.")
    encoder = load(model, device) if isinstance(model, str | Path) else model
    encoder.tokenize([""])  # an image tower alone fails before processes start
    batches = [range(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)]
    # The workers start here, before the bar's own thread does: a fork copies no thread.
    stream = in_order(Batches(encoder, batches, partial(read_row, source)), len(batches), workers)
    result = Classification(dict.fromkeys(names, 0))
    writing = nullcontext(None) if out is None else _writing(out, names, source, link)
    hand_over = on_prediction or (result.predictions.append if out is None else None)
    with naming_lost_workers(), writing as take, pairs_bar(progress, "images") as bar:
        weights = class_features(encoder, names, prompts, batch_size=batch_size).double()
        task = bar.add_task(f"Images of {source.name}", total=len(source))
        for pixels, rows, broken in stream:
            result.skipped.merge(broken)
            if pixels is not None:
                cosines = image_vectors(encoder, pixels).double() @ weights.T
                softmax = torch.softmax(logit_scale(encoder) * cosines, dim=1)
                for (key, _, place, origin), row in zip(rows, softmax.tolist(), strict=True):
                    best = max(range(len(row)), key=row.__getitem__)
                    prediction = Prediction(key, names[best], row[best], dict(zip(names, row, strict=True)))
                    result.counts[prediction.best] += 1
                    if take is not None:
                        take(prediction, place, origin)
                    if hand_over is not None:
                        hand_over(prediction)
            bar.advance(task, len(rows) + broken.total)
        if not any(result.counts.values()):
            raise UserError(f"None of the {len(source):,} images can be used: {result.skipped.explanation()}")
    return result


def read_classes(given: str | Path | Sequence[str]) -> list[str]:
    """Read class names: given, separated by commas, or from the lines of a file; at least two different ones."""
    if not isinstance(given, str | Path):
        names = list(given)
    elif "," in str(given) and not os.path.isfile(os.path.expanduser(given)):
        names = str(given).split(",")
    else:
        try:
            names = Path(given).expanduser().read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"The classes '{given}' cannot be read: {error}. Give a text file with one class a line, or names "
                "separated by commas."
            ) from error
    names = list(dict.fromkeys(filter(None, (" ".join(str(name).split()) for name in names))))
    if len(names) < 2:
        raise UserError(f"Give two classes or more, not {len(names)}{f': {names[0]!r}' if names else ''}.")
    return names


def _open(images: str | Path | PairSource | Items, columns: Columns) -> ImageSource:
    """Open images: also a single file, or the files of a pattern."""
    if not isinstance(images, str | Path):
        return ImageSource(open_source(images, columns))
    path = Path(images).expanduser()
    names = [str(path)] if path.exists() else sorted(glob(str(path), recursive=True))
    if files := [name for name in names if name.lower().endswith(EXTENSIONS)]:
        return ImageSource(open_source(files), captioned=False)
    return open_images(images, columns)


def _plain(cell: str) -> str:
    """A cell of which a spreadsheet computes nothing."""
    return f"'{cell}" if FORMULA.match(cell) else cell


@contextmanager
def _writing(out: Path, classes: Sequence[str], source: ImageSource, link: bool) -> Iterator[Take]:
    """Write predictions to a table or a folder, which appears when all are there."""
    suffix = out.suffix.lower()
    with atomic_write(out, ELSEWHERE) as target:
        folders = None if suffix in TABLES else _Folders(target, classes, source, link)
        path = target if suffix in TABLES else target / TABLE
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            table, before = csv.writer(file), chain(["[\n"], repeat(",\n"))

            def take_json(one: Prediction, *_: object) -> None:
                row = {"image": one.image, "class": one.best, "probability": one.probability}
                file.write(next(before) + json.dumps({**row, "probabilities": one.probabilities}))

            def take_row(one: Prediction, place: int, origin: Origin) -> None:
                numbers = (f"{number:.6g}" for number in (one.probability, *one.probabilities.values()))
                table.writerow([_plain(one.image), _plain(one.best), *numbers])
                if folders is not None:
                    folders.add(one, place, origin)

            if suffix == ".json":
                yield take_json
                file.write("\n]\n")
            else:
                table.writerow(["image", "class", "probability", *map(_plain, classes)])
                yield take_row


class _Folders:
    """A folder of images for each class; two images of the same name get numbers."""

    def __init__(self, target: Path, classes: Sequence[str], source: ImageSource, link: bool) -> None:
        self.source, self.link, self.taken = source, link, Counter[Path]()
        names = list(map(_file_name, classes))
        count = Counter([TABLE, *(name.lower() for name in names)])  # some file systems ignore case
        self.folders = dict[str, Path]()
        for n, (name, own) in enumerate(zip(classes, names, strict=True)):
            while count[own.lower()] > 1:  # classes whose folders would be one get numbers
                own = f"{own} {n}"
                count[own.lower()] += 1
            self.folders[name] = target / own
        for folder in self.folders.values():
            folder.mkdir(parents=True)

    def add(self, prediction: Prediction, place: int, origin: Origin) -> None:
        """Copy or link an image into the folder of its class."""
        file = Path(self.source.source.origin(place).path)  # as it is: `ImageSource` makes its name Unicode
        own_file = bool(origin.path) and not origin.offset and file.suffix.lower() in EXTENSIONS
        first = self.folders[prediction.best] / (_file_name(Path(prediction.image).name) + ("" if own_file else ".png"))
        target = first
        while os.path.lexists(target):
            self.taken[first] += 1
            target = first.with_name(f"{self.taken[first]} {first.name}")
        if not own_file:
            self.source[place].image.save(target, "PNG")
        elif self.link:
            target.symlink_to(file.absolute())
        else:
            shutil.copyfile(file, target)


def _file_name(text: str) -> str:
    return UNUSABLE.sub("_", text)[-LONGEST_NAME:].strip(". ") or "_"
