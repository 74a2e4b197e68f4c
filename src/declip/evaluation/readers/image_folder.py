"""A folder of images with one folder per class: any, Caltech-101, ImageNet and its relatives."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from declip.data.images.decode import EXTENSIONS
from declip.data.pair import is_unicode, printable
from declip.errors import UserError
from declip.evaluation.prompt_sets import class_names, read_prompts
from declip.evaluation.readers.images import LabeledFiles, Openers, sample_split
from declip.recipe.load import read_yaml

SPLITS: Mapping[str, Sequence[str]] = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid"),
    "test": ("test", "testing"),
}
"""Names of the folders of splits."""


def image_folder(name: str, root: Path) -> Openers:
    """Open any folder with one folder per class, or with splits that hold one folder per class.

    The folders' names, underscores as spaces, are the class names; a class is numbered by its position among the names
    of all splits. Without a test folder the validation folder is the test.
    """
    if not root.is_dir():
        raise UserError(f"There is no folder '{root}'.")
    folders: dict[str, Path] = {}
    for which, names in SPLITS.items():
        there = [root / each for each in names if (root / each).is_dir()]
        folders |= {which: there[0]} if there else {}
    if "train" not in folders or len(folders) == 1:
        if folders:
            raise UserError(
                f"'{root}' has the split {', '.join(sorted(folder.name for folder in folders.values()))} only. A set "
                "with splits needs a 'train' folder and a 'validation' or 'test' folder; to measure on one folder, "
                f"give that: 'folder:{next(iter(folders.values()))}'."
            )
        folders = {"test": root}
    if "test" not in folders:
        folders["test"] = folders.pop("validation")
    raw = sorted({each for folder in folders.values() for each in _inner(folder)})
    if len(raw) < 2:
        raise UserError(f"'{root}' needs one folder of images per class, at least two; it has {len(raw)}.")
    shown = [each.replace("_", " ") for each in raw]
    return {which: partial(_labeled, root.resolve().name, folder, raw, shown) for which, folder in folders.items()}


def caltech101(name: str, root: Path) -> Openers:
    """Open Caltech-101: `root` holds `caltech101/101_ObjectCategories/` with 102 folders.

    As in CLIP (Radford et al. 2021, appendix A), the background is a class, 30 images of each class are for training
    and all others for the test. The sample, which nobody published, is that of seed 0 over the paths in order.
    torchvision's reader is not used: it leaves the background out.
    """
    folder = root / "caltech101" / "101_ObjectCategories"
    raw = _exactly(name, folder, list(read_prompts(name).classes))
    shown = class_names(name, raw)
    return {which: partial(_sampled, name, folder, raw, shown, which) for which in ("train", "test")}


def imagenet(name: str, root: Path) -> Openers:
    """Open ImageNet: `root` holds `val/` and, for probes, `train/`, each with 1,000 folders named by WordNet number.

    The 50,000 validation images are the test, as everywhere: the test set's labels were never published.
    """
    wnids = list(read_prompts("imagenet").classes)
    folders = {"test": root / "val"} | ({"train": root / "train"} if (root / "train").is_dir() else {})
    return {
        which: partial(_labeled, name, folder, _exactly(name, folder, wnids), class_names("imagenet", wnids))
        for which, folder in folders.items()
    }


def imagenet_test(name: str, root: Path) -> Openers:
    """Open "imagenet-sketch", "imagenet-r" or "imagenet-a": `root` holds a folder per class, named by WordNet number.

    The last two hold 200 of the 1,000 classes, and only these can be chosen from.
    """
    wnids = _exactly(name, root, wnids_of(name))
    return {"test": partial(_labeled, name, root, wnids, class_names("imagenet", wnids))}


def imagenet_v2(name: str, root: Path) -> Openers:
    """Open ImageNet-V2 (any of its three): `root` holds folders 0 to 999, indices into the sorted WordNet numbers."""
    wnids = list(read_prompts("imagenet").classes)
    raw = _exactly(name, root, [str(number) for number in range(len(wnids))])
    return {"test": partial(_labeled, name, root, raw, class_names("imagenet", wnids))}


def wnids_of(name: str) -> list[str]:
    """The sorted WordNet numbers of ImageNet's classes in a dataset: 200 of "imagenet-r" and "imagenet-a"."""
    subsets = read_yaml((Path(__file__).parent / "imagenet_subsets.yaml").read_text(encoding="utf-8"))
    return list(subsets.get(name) or read_prompts("imagenet").classes)


def _exactly(name: str, folder: Path, raw: list[str]) -> list[str]:
    """Check that a folder holds the classes' folders, and no others."""
    if not folder.is_dir():
        raise UserError(f"'{name}' expects the folder '{folder}', with a folder for each of {len(raw)} classes.")
    there = set(_inner(folder))
    missing, strange = [each for each in raw if each not in there], sorted(there.difference(raw))
    if missing or strange:
        few = f"{len(missing)} of them are missing ('{missing[0]}' is the first)" if missing else ""
        more = f"{len(strange)} others are there ('{strange[0]}' is the first)" if strange else ""
        raise UserError(
            f"'{name}' expects {len(raw)} folders in '{folder}', from '{raw[0]}' to '{raw[-1]}', one per class: "
            f"{' and '.join(filter(None, (few, more)))}. Another selection of classes can be measured as "
            f"'folder:{folder}'."
        )
    return raw


def _labeled(name: str, folder: Path, raw: Sequence[str], shown: Sequence[str]) -> LabeledFiles:
    """The images of all classes, in the order of the classes' folders and then of the paths."""
    rows = _images(folder, raw)
    return LabeledFiles(name, folder, [path for path, _ in rows], [label for _, label in rows], shown)


def _sampled(name: str, folder: Path, raw: Sequence[str], shown: Sequence[str], which: str) -> LabeledFiles:
    rows = _images(folder, raw)
    chosen = [rows[row] for row in sample_split([label for _, label in rows], train=30)[which]]
    return LabeledFiles(name, folder, [path for path, _ in chosen], [label for _, label in chosen], shown)


def _images(folder: Path, raw: Sequence[str]) -> list[tuple[str, int]]:
    """Paths and classes in the order of torchvision's `make_dataset`.

    That one enters a folder again and again where links lead back to it; here a class enters each folder once.
    """
    rows = []
    for name, label in sorted((name, label) for label, name in enumerate(raw)):
        entered, walked = set[tuple[int, int]](), []
        for inner, folders, files in os.walk(folder / name, followlinks=True):
            folders.sort()
            status = os.stat(inner)
            if (status.st_dev, status.st_ino) in entered:
                folders.clear()
                continue
            entered.add((status.st_dev, status.st_ino))
            walked.append((inner, sorted(file for file in files if file.lower().endswith(EXTENSIONS))))
        rows += [(os.path.join(inner, file), label) for inner, files in sorted(walked) for file in files]
    return rows


def _inner(folder: Path) -> list[str]:
    """Names of the folders in it, but for hidden ones; raises `UserError` where one is no text."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_dir())
    if strange := [name for name in names if not is_unicode(name)]:
        raise UserError(f"'{folder}' has a folder whose name is not UTF-8: '{printable(strange[0])}'. Rename it.")
    return names
