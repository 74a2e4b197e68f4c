"""Pets, flowers, cars, aircraft, food and textures, in the folders that torchvision's readers expect."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchvision import datasets

from declip.evaluation.prompt_sets import class_names, read_prompts
from declip.evaluation.readers.images import LabeledFiles
from declip.evaluation.readers.layout import below, opened, require
from declip.evaluation.readers.splits import Openers


@dataclass(frozen=True)
class Reader:
    """How torchvision reads a set.

    Attributes:
        kind: Its class.
        splits: Our name of a split to its own.
        files: What must be there, relative to the set's folder.
        found: From torchvision's object to the images' paths and their labels.
    """

    kind: Callable[..., Any]
    splits: Mapping[str, str]
    files: Sequence[str]
    found: Callable[[Any], tuple[Sequence[Any], Sequence[int]]]


def _files(found: Any) -> tuple[Sequence[Any], Sequence[int]]:
    return found._image_files, found._labels


READERS: Mapping[str, Reader] = {
    "pets": Reader(
        datasets.OxfordIIITPet,
        {"train": "trainval", "test": "test"},
        (
            "oxford-iiit-pet/images/",
            "oxford-iiit-pet/annotations/trainval.txt",
            "oxford-iiit-pet/annotations/test.txt",
        ),
        lambda found: (found._images, found._labels),
    ),
    "flowers102": Reader(
        datasets.Flowers102,
        {"train": "train", "validation": "val", "test": "test"},
        ("flowers-102/jpg/", "flowers-102/imagelabels.mat", "flowers-102/setid.mat"),
        _files,
    ),
    "cars": Reader(
        datasets.StanfordCars,
        {"train": "train", "test": "test"},
        (
            "stanford_cars/cars_train/",
            "stanford_cars/cars_test/",
            "stanford_cars/devkit/cars_meta.mat",
            "stanford_cars/devkit/cars_train_annos.mat",
            "stanford_cars/cars_test_annos_withlabels.mat",
        ),
        lambda found: ([path for path, _ in found._samples], [label for _, label in found._samples]),
    ),
    "aircraft": Reader(
        datasets.FGVCAircraft,
        {"train": "train", "validation": "val", "test": "test"},
        (
            "fgvc-aircraft-2013b/data/images/",
            "fgvc-aircraft-2013b/data/variants.txt",
            "fgvc-aircraft-2013b/data/images_variant_train.txt",
            "fgvc-aircraft-2013b/data/images_variant_val.txt",
            "fgvc-aircraft-2013b/data/images_variant_test.txt",
        ),
        _files,
    ),
    "food101": Reader(
        datasets.Food101,
        {"train": "train", "test": "test"},
        ("food-101/images/", "food-101/meta/train.json", "food-101/meta/test.json"),
        _files,
    ),
    "dtd": Reader(
        datasets.DTD,
        {"train": "train", "validation": "val", "test": "test"},
        ("dtd/dtd/images/", "dtd/dtd/labels/train1.txt", "dtd/dtd/labels/val1.txt", "dtd/dtd/labels/test1.txt"),
        _files,
    ),
}
"""Of DTD the first of its ten partitions, as in CLIP (Radford et al. 2021, appendix A) and most papers."""


def fine_grained(name: str, root: Path) -> Openers:
    """Open one of `READERS`.

    Raises:
        UserError: files are missing.
    """
    reader = READERS[name]
    require(name, root, reader.files)
    return {which: partial(_split, name, root, own) for which, own in reader.splits.items()}


def _split(name: str, root: Path, split: str) -> LabeledFiles:
    return opened(name, root, lambda: _read_split(name, root, split))


def _read_split(name: str, root: Path, split: str) -> LabeledFiles:
    reader = READERS[name]
    found = reader.kind(root, split=split, download=False)
    paths, labels = reader.found(found)
    # Flowers' own files only number the classes, from 1.
    raw = list(read_prompts(name).classes) if name == "flowers102" else found.classes
    return LabeledFiles(name, root, below(root, paths), labels, class_names(name, raw))
