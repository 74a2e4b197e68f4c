"""CIFAR-10 and CIFAR-100 as Python pickles, which torchvision checks by their MD5 before it reads them."""

from functools import partial
from pathlib import Path

from torchvision import datasets

from declip.evaluation.prompt_sets import class_names
from declip.evaluation.readers.images import LabeledArrays
from declip.evaluation.readers.layout import opened, require
from declip.evaluation.readers.splits import Openers

KINDS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}


def cifar(name: str, root: Path) -> Openers:
    """Open "cifar10" or "cifar100": `root` holds `cifar-10-batches-py/` or `cifar-100-python/`.

    Raises:
        UserError: files are missing.
    """
    kind = KINDS[name]
    files = [file for file, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]
    require(name, root, [f"{kind.base_folder}/{file}" for file in files])
    return {"train": partial(_split, name, root, True), "test": partial(_split, name, root, False)}


def _split(name: str, root: Path, train: bool) -> LabeledArrays:
    def read() -> LabeledArrays:
        found = KINDS[name](root, train=train, download=False)
        return LabeledArrays(name, found.data, found.targets, class_names(name, found.classes))

    return opened(name, root, read)
