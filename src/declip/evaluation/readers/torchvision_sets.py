"""Datasets that torchvision reads."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torchvision import datasets

from declip.errors import UserError
from declip.evaluation.prompt_sets import class_names, read_prompts
from declip.evaluation.readers.images import Classified, FileList, ImageArray, Openers

TRAIN_VAL_TEST = {"train": "train", "validation": "val", "test": "test"}
TRAIN_TEST = {"train": "train", "test": "test"}

SETS: Mapping[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {
    "pets": (datasets.OxfordIIITPet, {"train": "trainval", "test": "test"}),
    "cifar10": (datasets.CIFAR10, {"train": True, "test": False}),
    "cifar100": (datasets.CIFAR100, {"train": True, "test": False}),
    "food101": (datasets.Food101, TRAIN_TEST),
    "flowers102": (datasets.Flowers102, TRAIN_VAL_TEST),
    "cars": (datasets.StanfordCars, TRAIN_TEST),
    "aircraft": (datasets.FGVCAircraft, TRAIN_VAL_TEST),
    # The first of DTD's ten partitions, as in CLIP (Radford et al. 2021, appendix A) and most papers.
    "dtd": (datasets.DTD, TRAIN_VAL_TEST),
}
"""Name → torchvision's class, and our splits → its argument. The class of CIFAR checks the MD5 of its pickles before
it reads them."""

SUN_LISTS = {"train": "Training_01.txt", "test": "Testing_01.txt"}
SUN_PLACES = ("SUN397", "SUN397/Partitions", "Partitions", ".")
"""Folders that may contain the lists, which come in a separate archive."""


def torchvision_set(name: str, root: Path) -> Openers:
    """Open one of `SETS`."""
    return {which: partial(_read, name, root, argument) for which, argument in SETS[name][1].items()}


def _read(name: str, root: Path, argument: str | bool) -> Classified:
    files = SETS[name][0](root, download=False, **{"train" if isinstance(argument, bool) else "split": argument})
    # The files of Flowers102 have class numbers from 1, without names.
    names = class_names(name, read_prompts(name).classes if name == "flowers102" else files.classes)
    if name.startswith("cifar"):
        return Classified(ImageArray(name, files.data), files.targets, names)
    if name == "cars":
        paths, labels = zip(*files._samples, strict=True)
    else:
        paths, labels = files._images if name == "pets" else files._image_files, files._labels
    return Classified(FileList(name, root, paths), labels, names)


def sun397(name: str, root: Path) -> Openers:
    """Open SUN397 in its official first partition (Xiao et al. 2010), whose lists are in one of `SUN_PLACES`."""
    for place in SUN_PLACES:
        if all((root / place / file).is_file() for file in SUN_LISTS.values()):
            return {which: partial(_sun, name, root / "SUN397", root / place / SUN_LISTS[which]) for which in SUN_LISTS}
    raise UserError(
        f"'{name}' expects in '{root}' SUN397/ and the lists {' and '.join(SUN_LISTS.values())} of its official first "
        "partition, from the archive Partitions.zip of the SUN database."
    )


def _sun(name: str, folder: Path, path: Path) -> Classified:
    classes = [line[3:] for line in (folder / "ClassName.txt").read_text(encoding="utf-8").split()]
    keys = [line.lstrip("/") for line in path.read_text(encoding="utf-8").split()]
    label_of = {raw: label for label, raw in enumerate(classes)}
    # "a/abbey/sun_aaa.jpg": the first letter, the class, which may contain a slash, and the file.
    labels = [label_of[key.partition("/")[2].rpartition("/")[0]] for key in keys]
    names = class_names(name, [raw.replace("/", " ") for raw in classes])
    return Classified(FileList(name, folder, keys), labels, names)
