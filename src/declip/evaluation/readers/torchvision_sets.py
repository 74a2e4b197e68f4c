"""Datasets that torchvision reads, from the folders that its readers expect."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torchvision import datasets

from declip.data.pair import PairSource
from declip.errors import UserError
from declip.evaluation.prompt_sets import class_names, read_prompts
from declip.evaluation.readers.images import LabeledArrays, LabeledFiles, Openers, opened, sample_split

Samples = tuple[Sequence[Any], Sequence[int]]


def _image_files(files: Any) -> Samples:
    return files._image_files, files._labels


def _pets(files: Any) -> Samples:
    return files._images, files._labels


def _cars(files: Any) -> Samples:
    return [path for path, _ in files._samples], [label for _, label in files._samples]


@dataclass(frozen=True)
class TorchvisionSet:
    """Opens a dataset by torchvision's reader.

    Attributes:
        kind: torchvision's class. CIFAR's checks the MD5 of its pickles before it reads them.
        folder: The folder that it expects in the dataset's folder.
        splits: Our split → torchvision's argument.
        samples: From torchvision's object to the images' paths and their labels; None: it holds images in memory.
    """

    kind: Callable[..., Any]
    folder: str
    splits: Mapping[str, str | bool]
    samples: Callable[[Any], Samples] | None = _image_files

    def __call__(self, name: str, root: Path) -> Openers:
        """Return the openers of the splits."""
        expected = f"{self.folder}/, as {self.kind.__name__} of torchvision.datasets reads it"
        return {
            which: partial(opened, name, root, expected, partial(self._read, name, root, argument))
            for which, argument in self.splits.items()
        }

    def _read(self, name: str, root: Path, argument: str | bool) -> PairSource:
        given = {"train": argument} if isinstance(argument, bool) else {"split": argument}
        files = self.kind(root, download=False, **given)
        # The files of Flowers102 only number the classes, from 1.
        names = class_names(name, read_prompts(name).classes if name == "flowers102" else files.classes)
        if self.samples is None:
            return LabeledArrays(name, files.data, files.targets, names)
        paths, labels = self.samples(files)
        return LabeledFiles(name, root, paths, labels, names)


TRAIN_VAL_TEST = {"train": "train", "validation": "val", "test": "test"}
TRAIN_TEST = {"train": "train", "test": "test"}
CIFAR = {"train": True, "test": False}

pets = TorchvisionSet(datasets.OxfordIIITPet, "oxford-iiit-pet", {"train": "trainval", "test": "test"}, _pets)
cifar10 = TorchvisionSet(datasets.CIFAR10, "cifar-10-batches-py", CIFAR, None)
cifar100 = TorchvisionSet(datasets.CIFAR100, "cifar-100-python", CIFAR, None)
food101 = TorchvisionSet(datasets.Food101, "food-101", TRAIN_TEST)
flowers102 = TorchvisionSet(datasets.Flowers102, "flowers-102", TRAIN_VAL_TEST)
cars = TorchvisionSet(datasets.StanfordCars, "stanford_cars", TRAIN_TEST, _cars)
aircraft = TorchvisionSet(datasets.FGVCAircraft, "fgvc-aircraft-2013b", TRAIN_VAL_TEST)
# The first of DTD's ten partitions, as in CLIP (Radford et al. 2021, appendix A) and most papers.
dtd = TorchvisionSet(datasets.DTD, "dtd", TRAIN_VAL_TEST)

SUN_PER_CLASS = 50
"""Images of each class in each half of an official partition (Xiao et al. 2010): 19,850 of the 108,754."""

SUN_LISTS = {"train": "Training_01.txt", "test": "Testing_01.txt"}
SUN_PLACES = ("SUN397", "SUN397/Partitions", "Partitions", ".")
"""Folders in which the lists, which come in an archive of their own, are looked for."""


def sun397(name: str, root: Path) -> Openers:
    """Open SUN397: `root` holds `SUN397/` with `ClassName.txt` and a folder for each first letter.

    With `Training_01.txt` and `Testing_01.txt` in one of `SUN_PLACES` the splits are the official first partition.
    Without them 50 images of each class for training and 50 others for the test are sampled with seed 0.
    """
    expected = "SUN397/ with ClassName.txt"
    return {which: partial(opened, name, root, expected, partial(_sun, name, root, which)) for which in SUN_LISTS}


def _sun(name: str, root: Path, which: str) -> LabeledFiles:
    folder = root / "SUN397"
    places = (root / place for place in SUN_PLACES)
    lists = next((place for place in places if all((place / file).is_file() for file in SUN_LISTS.values())), None)
    if lists is None:
        files = datasets.SUN397(root, download=False)
        # Sorted, since torchvision keeps the disk's order.
        rows = sorted(zip((path.as_posix() for path in files._image_files), files._labels, strict=True))
        chosen = sample_split([label for _, label in rows], SUN_PER_CLASS, SUN_PER_CLASS)[which]
        keys, labels = [rows[row][0] for row in chosen], [rows[row][1] for row in chosen]
        classes = files.classes
    else:
        classes = [line[3:].strip() for line in (folder / "ClassName.txt").read_text().splitlines() if line.strip()]
        keys = [
            line.strip().lstrip("/") for line in (lists / SUN_LISTS[which]).read_text().splitlines() if line.strip()
        ]
        label_of = {raw: label for label, raw in enumerate(classes)}
        # "a/abbey/sun_aaa.jpg": the first letter, the class, which may hold a slash itself, and the file.
        raw = [key.partition("/")[2].rpartition("/")[0] for key in keys]
        if strange := next((each for each in raw if each not in label_of), None):
            raise UserError(f"'{lists / SUN_LISTS[which]}' names the class '{strange}', which ClassName.txt does not.")
        labels = [label_of[each] for each in raw]
    return LabeledFiles(name, folder, keys, labels, class_names(name, [raw.replace("/", " ") for raw in classes]))
