"""Folders of images with one folder per class: custom ones, Caltech-101, ImageNet and its variants."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from declip.data.images.decode import EXTENSIONS
from declip.data.pair import is_unicode, printable
from declip.data.sources.subset import SPLITS
from declip.errors import UserError
from declip.evaluation.per_class import sample_per_class
from declip.evaluation.prompt_sets import class_names, read_prompts
from declip.evaluation.readers.images import Classified, FileList, Openers
from declip.recipe.yaml_text import read_yaml


def image_folder(name: str, root: Path) -> Openers:
    """Open any folder with one folder per class, or with folders of splits that contain one folder per class."""
    folders = {
        which: root / inner for which, names in SPLITS.items() for inner in reversed(names) if (root / inner).is_dir()
    }
    if not folders:
        folders = {"test": root}
    elif "train" not in folders or len(folders) == 1:
        raise UserError(
            f"A set with splits needs a 'train' folder and a 'validation' or 'test' folder, but '{root}' has only "
            f"{', '.join(folders)}. To evaluate on one folder, use 'folder:{next(iter(folders.values()))}'."
        )
    # Without a test folder, the validation folder is used.
    elif "test" not in folders:
        folders["test"] = folders.pop("validation")
    raw = sorted({inner for folder in folders.values() for inner in _inner(folder)})
    if len(raw) < 2:
        raise UserError(f"'{root}' needs one folder of images per class, at least two; it has {len(raw)}.")
    shown = [inner.replace("_", " ") for inner in raw]
    return {which: partial(_images, root.resolve().name, folder, raw, shown) for which, folder in folders.items()}


def caltech101(name: str, root: Path) -> Openers:
    """Open Caltech-101: `root` holds `caltech101/101_ObjectCategories/` with 102 folders.

    As in CLIP (Radford et al. 2021, appendix A), each class has 30 training images; all others are test images. CLIP's
    sample was not published; this one has seed 0.
    """
    # The background is a class, as in CLIP and unlike in torchvision's reader.
    folder = root / "caltech101" / "101_ObjectCategories"
    raw = _exactly(name, folder, list(read_prompts(name).classes))
    return {
        which: partial(_images, name, folder, raw, class_names(name, raw), sampled=which) for which in ("train", "test")
    }


def imagenet(name: str, root: Path) -> Openers:
    """Open ImageNet or a variant: folders named by WordNet ID, or in "imagenet-v2" by index into the sorted IDs.

    "imagenet-r" and "imagenet-a" have 200 of the 1,000 classes, and only these are candidates.
    """
    # The test split of ImageNet is `val/`, as in papers; probes also need `train/`.
    wnids = wnids_of(name)
    folders = {"test": root / "val" if name == "imagenet" else root}
    if name == "imagenet" and (root / "train").is_dir():
        folders["train"] = root / "train"
    raw = [str(number) for number in range(len(wnids))] if name == "imagenet-v2" else wnids
    shown = class_names("imagenet", wnids)
    return {
        which: partial(_images, name, folder, _exactly(name, folder, raw), shown) for which, folder in folders.items()
    }


def wnids_of(name: str) -> list[str]:
    """The sorted WordNet IDs of a dataset's classes; 200 for "imagenet-r" and "imagenet-a"."""
    subsets = read_yaml((Path(__file__).parent / "imagenet_subsets.yaml").read_text(encoding="utf-8"))
    return list(subsets.get(name) or read_prompts("imagenet").classes)


def _exactly(name: str, folder: Path, raw: list[str]) -> list[str]:
    """Check that a folder contains exactly the folders of the classes."""
    there = set(_inner(folder)) if folder.is_dir() else set()
    missing, strange = [inner for inner in raw if inner not in there], sorted(there.difference(raw))
    if missing or strange:
        raise UserError(
            f"'{name}' expects {len(raw)} folders in '{folder}', from '{raw[0]}' to '{raw[-1]}', one per class: "
            f"{len(missing)} are missing and {len(strange)} are unexpected ({[*missing, *strange][0]!r}). Evaluate "
            "on other classes as 'folder:PATH'."
        )
    return raw


def _images(
    name: str, folder: Path, raw: Sequence[str], shown: Sequence[str], sampled: str | None = None
) -> Classified:
    """List the images of all classes.

    With `sampled="train"`, 30 per class, or fewer so that one is left; with "test", all others.
    """
    paths: list[Path] = []
    labels: list[int] = []
    # In the order of torchvision's `make_dataset`.
    for inner, label in sorted((inner, label) for label, inner in enumerate(raw)):
        below = [Path(place, file) for place, _, files in os.walk(folder / inner) for file in files]
        images = sorted((path for path in below if path.suffix.lower() in EXTENSIONS), key=os.path.split)
        paths += images
        labels += [label] * len(images)
    chosen = np.ones(len(paths), dtype=bool)
    if sampled is not None:
        chosen = sample_per_class(np.array(labels), lambda count: min(30, max(count - 1, 1))) == (sampled == "train")
    files = FileList(name, folder, [path for path, kept in zip(paths, chosen, strict=True) if kept])
    return Classified(files, np.array(labels, dtype=np.int64)[chosen], shown)


def _inner(folder: Path) -> list[str]:
    """Names of the folders in a folder, without hidden ones; raises `UserError` for a name that is not UTF-8."""
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith(".") and entry.is_dir())
    if strange := [name for name in names if not is_unicode(name)]:
        raise UserError(f"'{folder}' has a folder whose name is not UTF-8: '{printable(strange[0])}'. Rename it.")
    return names
