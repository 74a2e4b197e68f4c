"""Evaluation datasets: opened by name, with their splits, class names, templates and metric."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from declip.data.builtin import BUILTIN_SPLITS, open_builtin
from declip.data.pair import BUILTIN_PREFIX, PairSource
from declip.data.sources.open import open_source
from declip.data.sources.table import TABLE_KINDS
from declip.errors import UserError, unknown
from declip.evaluation.readers import torchvision_sets as tv
from declip.evaluation.readers.captions import coco, flickr30k
from declip.evaluation.readers.image_folder import caltech101, image_folder, imagenet, imagenet_test, imagenet_v2
from declip.evaluation.readers.images import Openers
from declip.evaluation.readers.labeled_table import label_column_of, labeled_table

DEFAULT_TEMPLATES = "plain"
BUILTIN_TEMPLATES: Mapping[str, str] = {"builtin:emoji": "emoji", "builtin:icons": "emoji"}
"""Beginnings of the names of built-in sets → template sets."""


class LabeledSource(PairSource):
    """A source whose images each belong to one of several named classes."""

    labels: np.ndarray
    class_names: Sequence[str]


@dataclass(frozen=True)
class Named:
    """A dataset that the user has in a folder; `open` takes its name and folder. Further fields as of `Dataset`."""

    open: Callable[[str, Path], Openers]
    templates: str = DEFAULT_TEMPLATES
    metric: str = "top1"


NAMED: Mapping[str, Named] = {
    "pets": Named(tv.pets, "pets", "mean_per_class"),
    "cifar10": Named(tv.cifar10, "cifar10"),
    "cifar100": Named(tv.cifar100, "cifar100"),
    "sun397": Named(tv.sun397, "sun397"),
    "food101": Named(tv.food101, "food101"),
    "flowers102": Named(tv.flowers102, "flowers102", "mean_per_class"),
    "cars": Named(tv.cars, "cars"),
    "caltech101": Named(caltech101, "caltech101", "mean_per_class"),
    "aircraft": Named(tv.aircraft, "aircraft", "mean_per_class"),
    "dtd": Named(tv.dtd, "dtd"),
    "imagenet": Named(imagenet, "imagenet"),
    "imagenet-v2": Named(imagenet_v2, "imagenet"),
    "imagenet-r": Named(imagenet_test, "imagenet"),
    "imagenet-sketch": Named(imagenet_test, "imagenet"),
    "imagenet-a": Named(imagenet_test, "imagenet"),
    "coco": Named(coco),
    "flickr30k": Named(flickr30k),
    "folder": Named(image_folder),
}
"""Names of `NAME:/path`. Metrics as in CLIP's table of datasets (Radford et al. 2021, appendix A)."""


@dataclass(frozen=True)
class Dataset:
    """A named dataset with its splits, each opened when it is first used.

    Attributes:
        name: As the user wrote it: "pets:/data/pets", "builtin:stamps", "data/mine.csv". Results are stored by it.
        openers: Functions that open each split; "test" is always there.
        templates: Name of a template set.
        metric: Metric of the dataset's convention: "top1" or "mean_per_class".
    """

    name: str
    openers: Openers
    templates: str = DEFAULT_TEMPLATES
    metric: str = "top1"
    _opened: dict[str, PairSource] = field(default_factory=dict, init=False, repr=False, compare=False)

    def has(self, which: str) -> bool:
        """Whether there is such a split."""
        return which in self.openers

    def split(self, which: str) -> PairSource:
        """Open a split, once."""
        if which not in self.openers:
            raise UserError(f"'{self.name}' has no {which} split. It has: {', '.join(self.openers)}.")
        if which not in self._opened:
            source = self.openers[which]()
            if len(source) == 0:
                raise UserError(f"'{self.name}' holds no pair in its {which} split. Nothing can be measured on it.")
            self._opened[which] = source
        return self._opened[which]


def open_dataset(dataset: str | PairSource | Dataset, *, label_column: str | None = None) -> Dataset:
    """Open a dataset by its name, or make one of an open source; its test split is opened at once.

    Args:
        dataset: ``NAME:/path`` with a name in `NAMED`, such as "pets:/data/pets" or "folder:/data/mine"; a table, which
            has classes where it has a column of labels; anything else that `open_source` opens; an open source; or an
            open dataset, which is returned.
        label_column: A table's column; None looks for "label", "class", "class_name" or "category".
    """
    if isinstance(dataset, str):
        dataset = _by_name(dataset, label_column)
    elif not isinstance(dataset, Dataset):
        dataset = _single(dataset, dataset.name)
    dataset.split("test")
    return dataset


def with_classes(source: PairSource) -> LabeledSource:
    """Check that a source can be classified."""
    labels, names = source.labels, source.class_names
    if labels is None or names is None:
        raise UserError(
            f"'{source.name}' has no classes, so zero-shot classification cannot be measured on it. It needs "
            f"`labels` (one class number for each of its {len(source)} pairs) and `class_names`. "
            "Use the task 'retrieval', which needs captions only, or a source with classes."
        )
    if len(labels) != len(source) or len(names) < 2:
        raise UserError(
            f"'{source.name}' has {len(labels)} labels and {len(names)} class names for {len(source)} pairs. "
            "Zero-shot classification needs one label per pair and at least two classes."
        )
    return cast(LabeledSource, source)


def _by_name(given: str, label_column: str | None) -> Dataset:
    name, colon, place = given.partition(":")
    path = Path(given).expanduser()
    table = name not in NAMED and given.lower().endswith(TABLE_KINDS)
    if label_column is not None and not table:
        raise UserError(f"A column of labels ('{label_column}') was named, but '{given}' is not a table.")
    if given.startswith(BUILTIN_PREFIX):
        splits = BUILTIN_SPLITS.get(place, {"test": place})
        openers = {which: partial(open_builtin, source) for which, source in splits.items()}
        return Dataset(given, openers, _templates(given))
    if name in NAMED and colon:
        if not place:
            raise UserError(f"'{given}' names no folder. Write '{name}:PATH'.")
        named = NAMED[name]
        return Dataset(given, named.open(name, Path(place).expanduser()), named.templates, named.metric)
    # One letter before a colon is a Windows drive.
    if colon and re.fullmatch(r"[\w-]{2,}", name) and not path.exists():
        raise unknown("dataset", name, [*NAMED, BUILTIN_PREFIX.rstrip(":")])
    column = label_column_of(path, label_column) if table and path.is_file() else None
    return _single(open_source(given), given) if column is None else Dataset(given, labeled_table(path, column))


def _single(source: PairSource, name: str) -> Dataset:
    return Dataset(name, {"test": partial(_identity, source)}, _templates(source.name))


def _identity(source: PairSource) -> PairSource:
    return source


def _templates(name: str) -> str:
    matches = (templates for start, templates in BUILTIN_TEMPLATES.items() if name.startswith(start))
    return next(matches, DEFAULT_TEMPLATES)
