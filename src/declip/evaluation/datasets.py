"""What is measured on: opening a set by its name, with its splits, class names, templates and metric."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import numpy as np

from declip.data.builtin import BUILTIN_SPLITS, open_builtin
from declip.data.pair import BUILTIN_PREFIX, PairSource
from declip.data.sources.open import open_source
from declip.data.sources.table import TABLE_KINDS
from declip.errors import UserError, unknown
from declip.evaluation.readers.captions import coco, flickr30k
from declip.evaluation.readers.cifar import cifar
from declip.evaluation.readers.fine_grained import fine_grained
from declip.evaluation.readers.image_folder import caltech101, image_folder, imagenet, imagenet_test, imagenet_v2
from declip.evaluation.readers.labeled_table import label_column_of, labeled_table
from declip.evaluation.readers.splits import Openers
from declip.evaluation.readers.sun397 import sun397

DEFAULT_TEMPLATES = "plain"

TEMPLATES: Mapping[str, str] = {
    "builtin:emoji": "emoji",
    "builtin:icons": "emoji",
}
"""Template set by the beginning of a source's name; every other source gets `DEFAULT_TEMPLATES`."""


@runtime_checkable
class LabeledSource(PairSource, Protocol):
    """A source whose images each belong to one of several named classes."""

    labels: np.ndarray
    class_names: Sequence[str]


@dataclass(frozen=True)
class Named:
    """How a set is read that the user names and has in a folder.

    Attributes:
        open: From the set's name and its folder to what opens its splits; checks that the files are there.
        templates: Its template set.
        metric: What its convention reports: "top1" or "mean_per_class".
    """

    open: Callable[[str, Path], Openers]
    templates: str = DEFAULT_TEMPLATES
    metric: str = "top1"


NAMED: Mapping[str, Named] = {
    "pets": Named(fine_grained, "pets", "mean_per_class"),
    "cifar10": Named(cifar, "cifar10"),
    "cifar100": Named(cifar, "cifar100"),
    "sun397": Named(sun397, "sun397"),
    "food101": Named(fine_grained, "food101"),
    "flowers102": Named(fine_grained, "flowers102", "mean_per_class"),
    "cars": Named(fine_grained, "cars"),
    "caltech101": Named(caltech101, "caltech101", "mean_per_class"),
    "aircraft": Named(fine_grained, "aircraft", "mean_per_class"),
    "dtd": Named(fine_grained, "dtd"),
    "imagenet": Named(imagenet, "imagenet"),
    "imagenet-v2": Named(imagenet_v2, "imagenet"),
    "imagenet-r": Named(imagenet_test, "imagenet"),
    "imagenet-sketch": Named(imagenet_test, "imagenet"),
    "imagenet-a": Named(imagenet_test, "imagenet"),
    "coco": Named(coco),
    "flickr30k": Named(flickr30k),
    "folder": Named(image_folder),
}
"""What `NAME:/path` may name. Metrics as in CLIP's table of data sets (Radford et al. 2021, appendix A)."""


@dataclass(frozen=True)
class Dataset:
    """A named set with its splits, each opened when it is first asked for.

    Attributes:
        name: As the user wrote it, which results are kept by: "pets:/data/pets", "builtin:stamps", "data/mine.csv".
        openers: What opens each split; keys among "train", "validation", "test", of which "test" is always there.
        templates: Name of a template set.
        metric: What the set's convention reports: "top1" or "mean_per_class".
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
        """A split, opened once.

        Raises:
            UserError: there is none, its files are not what they should be, or it is empty.
        """
        if which not in self.openers:
            raise UserError(f"'{self.name}' has no {which} split. It has: {', '.join(self.openers)}.")
        if which not in self._opened:
            source = self.openers[which]()
            if len(source) == 0:
                raise UserError(f"'{self.name}' holds no pair in its {which} split. Nothing can be measured on it.")
            self._opened[which] = source
        return self._opened[which]


def open_dataset(on: str | PairSource | Dataset, *, label_column: str | None = None) -> Dataset:
    """Open a set by its name, or make one of an open source; its test split is opened at once.

    Args:
        on: ``NAME:/path`` with one of `NAMED`, such as "pets:/data/pets" or "folder:/data/mine"; a table, which has
            classes where it has a column of labels; what else `open_source` opens; an open
            source; or an open set, which is handed back.
        label_column: Of a table; None looks for "label", "class", "class_name" or "category".

    Raises:
        UserError: there is no such set, files of it are missing, or it is empty.
    """
    if isinstance(on, Dataset):
        dataset = on
    elif isinstance(on, str):
        dataset = _by_name(on, label_column)
    else:
        dataset = _single(on, on.name)
    dataset.split("test")
    return dataset


def with_classes(source: PairSource) -> LabeledSource:
    """Check that a source can be classified.

    Raises:
        UserError: it has no labels or class names, not one label a pair, or fewer than two classes.
    """
    labels, names = getattr(source, "labels", None), getattr(source, "class_names", None)
    if labels is None or names is None:
        raise UserError(
            f"'{source.name}' has no classes, so zero-shot classification cannot be measured on it. It needs "
            f"`labels` (one class number for each of its {len(source)} pairs) and `class_names`. "
            "Use the protocol 'retrieval', which needs captions only, or a source with classes."
        )
    if len(labels) != len(source) or len(names) < 2:
        raise UserError(
            f"'{source.name}' has {len(labels)} labels and {len(names)} class names for {len(source)} pairs. "
            "Zero-shot classification needs one label a pair and at least two classes."
        )
    return cast(LabeledSource, source)


def templates_of(source: PairSource) -> str:
    """The name of the template set that belongs to a source."""
    return _templates_named(source.name)


def _by_name(on: str, label_column: str | None) -> Dataset:
    name, colon, place = on.partition(":")
    table = name not in NAMED and on.lower().endswith(TABLE_KINDS)
    if label_column is not None and not table:
        raise UserError(f"A column of labels ('{label_column}') was named, but '{on}' is not a table.")
    if on.startswith(BUILTIN_PREFIX):
        name = on.removeprefix(BUILTIN_PREFIX)
        splits = BUILTIN_SPLITS.get(name, {"test": name})
        openers = {which: partial(open_builtin, source) for which, source in splits.items()}
        return Dataset(on, openers, _templates_named(on))
    if name in NAMED and colon:
        if not place:
            raise UserError(f"'{on}' names no folder. Write '{name}:PATH'.")
        return _named(on, name, Path(place).expanduser())
    # One letter before a colon is a Windows drive.
    if colon and re.fullmatch(r"[\w-]{2,}", name) and not Path(on).exists():
        raise unknown("data set", name, [*NAMED, BUILTIN_PREFIX.rstrip(":")])
    path = Path(on).expanduser()
    column = label_column_of(path, label_column) if table and path.is_file() else None
    return _single(open_source(on), on) if column is None else Dataset(on, labeled_table(path, column))


def _named(on: str, name: str, root: Path) -> Dataset:
    named = NAMED[name]
    openers = named.open(root.resolve().name if name == "folder" else name, root)
    return Dataset(on, openers, named.templates, named.metric)


def _single(source: PairSource, name: str) -> Dataset:
    return Dataset(name, {"test": partial(_itself, source)}, templates_of(source))


def _itself(source: PairSource) -> PairSource:
    return source


def _templates_named(name: str) -> str:
    return next((templates for start, templates in TEMPLATES.items() if name.startswith(start)), DEFAULT_TEMPLATES)
