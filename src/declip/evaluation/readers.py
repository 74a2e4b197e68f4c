"""Sources of evaluation sets: folders and tables with classes, and the sets that torchvision reads."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from declip.data.columns import DEFAULT, Columns
from declip.data.images.decode import EXTENSIONS
from declip.data.pair import (
    BrokenPair,
    OnDemand,
    Pair,
    PairSource,
    is_unicode,
    printable,
    raise_broken,
)
from declip.data.sources.folder import FileList
from declip.data.sources.header import CAPTION_NAMES, Header
from declip.data.sources.python_items import ItemSource
from declip.data.sources.rows import by_lower_name, cell_name, label_names
from declip.data.sources.splits import SPLITS, splits_of
from declip.data.sources.subset import Subset
from declip.data.sources.table import TableSource, open_rows
from declip.errors import UserError, unknown
from declip.evaluation.prompt_sets import class_names, read_prompts
from declip.evaluation.results import sample_per_class
from declip.io.yaml_dialect import read_yaml

Openers = Mapping[str, Callable[[], PairSource]]  # functions that open each split
# Default names of the label column, in order of preference
LABEL_NAMES = ("label", "class", "class_name", "category")
LONGEST_LABEL = 1_000  # characters: a label is a name, not a text
PETS_LISTS = {"train": "trainval.txt", "test": "test.txt"}
SUN_LISTS = {"train": "Training_01.txt", "test": "Testing_01.txt"}
# Of the lists, which come in a separate archive
SUN_PLACES = ("SUN397", "SUN397/Partitions", "Partitions", ".")


class Classified(Subset):
    """Images of a source with one class each; without `captioned` the class name is the caption.

    `rows` (n,) are indices into the source. Those in `broken` have no class: each is a broken pair, whose label is
    ignored.
    """

    class_names: tuple[str, ...]

    def __init__(
        self,
        source: PairSource,
        labels: Sequence[int] | np.ndarray,
        class_names: Sequence[str],
        *,
        rows: np.ndarray | None = None,
        captioned: bool = False,
        broken: Mapping[int, BrokenPair] | None = None,
    ) -> None:
        if rows is None:
            rows = np.arange(len(source))
        super().__init__(source, rows, source.name)
        self.captioned = captioned
        self.broken = broken or {}
        self.class_names = tuple(class_names)
        columns = {"label": partial(np.asarray, labels, np.int64)}
        if "group" in source.columns:
            columns["group"] = partial(self._column, "group")
        self.columns = OnDemand(columns)

    def __getitem__(self, index: int) -> Pair:
        pair = super().__getitem__(index)
        row = int(self.indices[index])
        if row in self.broken:
            return replace(pair, captions=partial(raise_broken, self.broken[row]))
        if self.captioned:
            return pair
        name = self.class_names[self.columns["label"][index]]
        return replace(pair, captions=partial(tuple, [name]))


def image_folder(name: str, root: Path) -> Openers:
    """Open any folder with one folder per class, or with folders of splits that contain one folder per class."""
    folders = dict[str, Path]()
    for which, names in SPLITS.items():
        for inner in reversed(names):
            folder = root / inner
            if folder.is_dir():
                folders[which] = folder
    if folders and ("train" not in folders or len(folders) == 1):
        raise UserError(
            f"A set with splits needs a 'train' folder and a 'validation' or 'test' folder, but '{root}' has only "
            f"{', '.join(folders)}. To evaluate on one folder, use 'folder:{next(iter(folders.values()))}'."
        )
    # Without a test folder, the validation folder is used; without any, this one.
    if "test" not in folders:
        folders["test"] = folders.pop("validation", root)
    raw = sorted({inner for folder in folders.values() for inner in _inner(folder)})
    if len(raw) < 2:
        raise UserError(
            f"'{root}' needs one folder of images per class, at least two; it has {len(raw)}."
        )
    shown = [inner.replace("_", " ") for inner in raw]
    return {
        which: partial(_images, root.resolve().name, folder, raw, shown)
        for which, folder in folders.items()
    }


def caltech101(name: str, root: Path) -> Openers:
    """Open Caltech-101: 30 training images of each class, all others for the test, as in CLIP (2021, appendix A)."""
    # The background is a class, unlike in torchvision's reader. CLIP's sample was not published; this one has seed 0.
    folder = root / "caltech101" / "101_ObjectCategories"
    raw = _exactly(name, folder, list(read_prompts(name).classes))
    return {which: partial(_caltech101, name, folder, raw, which) for which in ("train", "test")}


def _caltech101(name: str, folder: Path, raw: list[str], which: str) -> Classified:
    images = _images(name, folder, raw, class_names(name, raw))
    labels = images.columns["label"]
    trained = sample_per_class(labels, lambda count: min(30, max(count - 1, 1)))
    rows = np.flatnonzero(trained == (which == "train"))
    return Classified(images.source, labels[rows], images.class_names, rows=rows)


def imagenet(name: str, root: Path) -> Openers:
    """Open ImageNet or a variant: folders named by WordNet ID, or in "imagenet-v2" by index into the sorted IDs.

    "imagenet-r" and "imagenet-a" have 200 of the 1,000 classes, and only these are candidates.
    """
    # The test split of ImageNet is `val/`, as in papers; probes also need `train/`.
    wnids = wnids_of(name)
    folders = {"test": root}
    if name == "imagenet":
        folders["test"] = root / "val"
        train = root / "train"
        if train.is_dir():
            folders["train"] = train
    raw = wnids
    if name == "imagenet-v2":
        raw = [str(number) for number in range(len(wnids))]
    shown = class_names("imagenet", wnids)
    return {
        which: partial(_images, name, folder, _exactly(name, folder, raw), shown)
        for which, folder in folders.items()
    }


def wnids_of(name: str) -> list[str]:
    """The sorted WordNet IDs of a dataset's classes; 200 for "imagenet-r" and "imagenet-a"."""
    file = Path(__file__).parent / "imagenet_subsets.yaml"
    text = file.read_text(encoding="utf-8")
    subsets = read_yaml(text)
    return list(subsets.get(name) or read_prompts("imagenet").classes)


def _exactly(name: str, folder: Path, raw: list[str]) -> list[str]:
    """Check that a folder contains exactly the folders of the classes."""
    if not folder.is_dir():
        raise UserError(
            f"'{name}' expects {len(raw)} folders in '{folder}', one per class, and there is no such folder."
        )
    there = set(_inner(folder))
    missing = [inner for inner in raw if inner not in there]
    strange = sorted(there.difference(raw))
    if missing or strange:
        raise UserError(
            f"'{name}' expects {len(raw)} folders in '{folder}', from '{raw[0]}' to '{raw[-1]}', one per class: "
            f"{len(missing)} are missing and {len(strange)} are unexpected ({[*missing, *strange][0]!r}). Evaluate "
            "on other classes as 'folder:PATH'."
        )
    return raw


def _images(name: str, folder: Path, raw: Sequence[str], shown: Sequence[str]) -> Classified:
    """List the images of all classes, in the order of torchvision's `make_dataset`."""
    paths = list[Path]()
    labels = list[int]()
    for label in sorted(range(len(raw)), key=raw.__getitem__):
        images = list[Path]()
        for parent, _, files in os.walk(folder / raw[label]):
            below = [Path(parent, file) for file in files]
            images += [path for path in below if path.suffix.lower() in EXTENSIONS]
        paths += sorted(images, key=os.path.split)
        labels += [label] * len(images)
    return Classified(FileList(name, folder, paths), labels, shown)


def _inner(folder: Path) -> list[str]:
    """Names of the folders in a folder, without hidden ones; raises `UserError` for a name that is not UTF-8."""
    folders = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    names = sorted(name for name in folders if not name.startswith("."))
    for name in names:
        if not is_unicode(name):
            raise UserError(
                f"'{folder}' has a folder whose name is not UTF-8: '{printable(name)}'. Rename it."
            )
    return names


def labeled_table(
    table_path: str | Path, label_column: str | None, given: Columns = DEFAULT
) -> Openers | None:
    """Open a table with labels or splits; None if it has neither.

    `class_names` are the sorted labels of all splits, or the names that Hugging Face's `datasets` wrote into a Parquet
    file for its numbers. A column "split" defines splits; without it, all rows are test rows.
    """
    rows = open_rows(table_path)
    path = rows.path
    columns = rows.columns
    lower = by_lower_name(columns).keys()
    captioned = not lower.isdisjoint(CAPTION_NAMES)
    if given.caption != DEFAULT.caption:
        captioned = given.caption is not None  # refused below where it is missing
    column = label_column
    if column is not None and column not in columns:
        raise unknown(f"column of labels in '{path.name}'", column, columns)
    if column is None and not lower.isdisjoint(LABEL_NAMES):
        column = Header(columns, path).column(LABEL_NAMES[0], LABEL_NAMES, "label")
    if column is None and not (captioned and "split" in lower):
        return None
    # --- the pairs of the table, and the rows of each split
    own = given
    if not captioned:
        own = replace(given, caption=None)
    labeled_rows = TableSource(table_path, replace(own, group=column))
    table = labeled_rows
    if given.group is not None:
        table = TableSource(table_path, own)
    rows_of = splits_of(table) or {"test": np.arange(len(table))}
    if "test" not in rows_of:
        raise UserError(
            f"'{path.name}' has no test pairs: its splits are {', '.join(rows_of)}. Name some rows 'test'."
        )
    pairs = {which: partial(Subset, table, rows) for which, rows in rows_of.items()}
    if column is None:
        return pairs
    labels, names, broken = _labels(labeled_rows, column)
    if len(names) < 2:
        # A column that nobody named says nothing about captioned pairs.
        if captioned and label_column is None:
            return pairs
        problem = f"Column '{column}' of '{table.name}' has {len(names)} classes."
        raise UserError(f"{problem} It needs at least two.")
    return {
        which: partial(
            Classified, table, labels[rows], names, rows=rows, captioned=captioned, broken=broken
        )
        for which, rows in rows_of.items()
    }


def _labels(table: TableSource, column: str) -> tuple[np.ndarray, list[str], dict[int, BrokenPair]]:
    """The class of each row, (n,) int64, the names of the classes, and the reasons of rows without a class."""
    known = label_names(table.file, column)
    texts = dict[int, str]()
    broken = dict[int, BrokenPair]()
    for row in range(len(table)):
        try:
            texts[row] = _label(table, row, column)
        except BrokenPair as error:
            broken[row] = error
    names = known or sorted(set(texts.values()))
    if not known and all(name.isdecimal() and len(name) < 20 for name in names):
        names.sort(key=int)
    number_of = {name: number for number, name in enumerate(names)}
    labels = np.zeros(len(table), dtype=np.int64)
    for row, text in texts.items():
        if text in number_of:
            labels[row] = number_of[text]
        else:
            broken[row] = BrokenPair(
                "missing label", table[row].key, f"'{text}' is not one of the classes"
            )
    return labels, names, broken


def _label(table: TableSource, row: int, column: str) -> str:
    """Return the single label in the cells of one image, strings or numbers; raises `BrokenPair`."""
    key, rows = table.entry(row)
    values = list[Any]()
    for number in rows:
        cell = table.cell(key, number, column)
        values += cell if isinstance(cell, list) else [cell]
    if any(isinstance(value, str) and len(value) > LONGEST_LABEL for value in values):
        raise BrokenPair("label too long", key, f"more than {LONGEST_LABEL:,} characters")
    texts = {" ".join(cell_name(value).split()) for value in values}
    if "" in texts:
        raise BrokenPair("missing label", key)
    if not all(map(is_unicode, texts)):
        raise BrokenPair("invalid text", key, "half of a character that takes two code units")
    if len(texts) > 1:
        raise BrokenPair("conflicting labels", key, ", ".join(sorted(texts)))
    return texts.pop()


def torchvision_set(kind: str, splits: Mapping[str, Any]) -> Callable[[str, Path], Openers]:
    """The function that opens a set by a class of torchvision, by our splits and its argument for each."""
    return lambda name, root: {
        which: partial(_torchvision_split, kind, name, root, argument)
        for which, argument in splits.items()
    }


def _torchvision_split(kind: str, name: str, root: Path, argument: str | bool) -> Classified:
    from torchvision import datasets  # takes a second

    made = getattr(datasets, kind)
    make = partial(made, root, download=False)
    if isinstance(argument, bool):  # of CIFAR, whose class checks the MD5 of pickles before reading
        batches = make(train=argument)
        images = ItemSource(batches.data)
        images.name = name
        return Classified(images, batches.targets, class_names(name, batches.classes))
    if "loader" not in signature(made).parameters:
        problem = f"'{name}' needs torchvision 0.22 or newer"
        raise UserError(f"{problem}: pip install -U torch torchvision.")
    files = make(split=argument, loader=Path)  # items are paths and labels: no image is opened
    items = [files[index] for index in range(len(files))]
    paths = [path for path, _ in items]
    labels = [label for _, label in items]
    # The files of Flowers102 have class numbers from 1, without names.
    raw = read_prompts(name).classes if name == "flowers102" else files.classes
    return Classified(FileList(name, root, paths), labels, class_names(name, raw))


def pets(name: str, root: Path) -> Openers:
    """Open Oxford-IIIT Pets by its lists of the images of each split."""
    folder = root / "oxford-iiit-pet"
    return {which: partial(_pets, name, folder, file) for which, file in PETS_LISTS.items()}


def _pets(name: str, folder: Path, file: str) -> Classified:
    # "american_bulldog_7 2 2 1": the breed and a number, which name the image; the class from 1
    text = (folder / "annotations" / file).read_text(encoding="utf-8")
    paths = list[Path]()
    labels = list[int]()
    breeds = dict[int, str]()
    for line in text.splitlines():
        image, number, *_ = line.split()
        label = int(number) - 1
        paths.append(folder / "images" / f"{image}.jpg")
        labels.append(label)
        breed = image.rpartition("_")[0]
        breeds[label] = breed.replace("_", " ").title()
    raw = [breeds[label] for label in sorted(breeds)]
    return Classified(FileList(name, folder.parent, paths), labels, class_names(name, raw))


def sun397(name: str, root: Path) -> Openers:
    """Open SUN397 in its official first partition (Xiao et al. 2010), whose lists are in one of `SUN_PLACES`."""
    for inner in SUN_PLACES:
        if all((root / inner / file).is_file() for file in SUN_LISTS.values()):
            return {
                which: partial(_sun397, name, root / "SUN397", root / inner / file)
                for which, file in SUN_LISTS.items()
            }
    raise UserError(
        f"'{name}' expects in '{root}' SUN397/ and the lists {' and '.join(SUN_LISTS.values())} of its official first "
        "partition, from the archive Partitions.zip of the SUN database."
    )


def _sun397(name: str, folder: Path, path: Path) -> Classified:
    lines = (folder / "ClassName.txt").read_text(encoding="utf-8").split()
    classes = [line[3:] for line in lines]
    keys = [line.lstrip("/") for line in path.read_text(encoding="utf-8").split()]
    label_of = {raw: label for label, raw in enumerate(classes)}
    # "a/abbey/sun_aaa.jpg": the first letter, the class, which may contain a slash, and the file.
    labels = [label_of[key.partition("/")[2].rpartition("/")[0]] for key in keys]
    spaced = [raw.replace("/", " ") for raw in classes]
    names = class_names(name, spaced)
    return Classified(FileList(name, folder, keys), labels, names)


class Named(NamedTuple):
    """A known dataset in a folder of the user; error messages name the expected `files`."""

    open: Callable[[str, Path], Openers]
    files: str
    templates: str = "plain"
    metric: str = "top1"


PER_CLASS = "mean_per_class"
VARIANT = Named(imagenet, "one folder per WordNet number", "imagenet")
# Our splits → the arguments of torchvision's classes
FLAG = {"train": True, "test": False}
PLAIN = {"train": "train", "test": "test"}
WITH_VAL = {"train": "train", "validation": "val", "test": "test"}

NAMED: Mapping[str, Named] = {
    "pets": Named(pets, "oxford-iiit-pet/", "pets", PER_CLASS),
    "cifar10": Named(torchvision_set("CIFAR10", FLAG), "cifar-10-batches-py/", "cifar10"),
    "cifar100": Named(torchvision_set("CIFAR100", FLAG), "cifar-100-python/", "cifar100"),
    "sun397": Named(sun397, "SUN397/ with ClassName.txt", "sun397"),
    "food101": Named(torchvision_set("Food101", PLAIN), "food-101/", "food101"),
    "flowers102": Named(
        torchvision_set("Flowers102", WITH_VAL), "flowers-102/", "flowers102", PER_CLASS
    ),
    "cars": Named(torchvision_set("StanfordCars", PLAIN), "stanford_cars/", "cars"),
    "caltech101": Named(caltech101, "caltech101/101_ObjectCategories/", "caltech101", PER_CLASS),
    "aircraft": Named(
        torchvision_set("FGVCAircraft", WITH_VAL), "fgvc-aircraft-2013b/", "aircraft", PER_CLASS
    ),
    # The first of DTD's ten partitions, as in CLIP (Radford et al. 2021, appendix A) and most papers.
    "dtd": Named(torchvision_set("DTD", WITH_VAL), "dtd/", "dtd"),
    "imagenet": Named(imagenet, "val/", "imagenet"),
    "imagenet-v2": Named(imagenet, "folders 0 to 999", "imagenet"),
    **dict.fromkeys(("imagenet-r", "imagenet-sketch", "imagenet-a"), VARIANT),
    "folder": Named(image_folder, "one folder of images per class"),
}
"""Names of `NAME:/path`. Metrics as in CLIP's table of datasets (Radford et al. 2021, appendix A)."""
