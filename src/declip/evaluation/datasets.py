"""Evaluation datasets by name, with their splits, class names, templates and metric."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import cast

import numpy as np

from declip.data.columns import DEFAULT, Columns
from declip.data.pair import PairSource, printable
from declip.data.sources.open import NO_SOURCES, Sources, open_source
from declip.data.sources.python_items import PREFIX, Items
from declip.data.sources.splits import splits_of
from declip.data.sources.subset import Subset
from declip.data.sources.table import find_table
from declip.errors import UserError, unknown
from declip.evaluation.readers import NAMED, Openers, labeled_table
from declip.io.plugins import BUILTIN, names_plugin, plugins


class LabeledSource(PairSource):
    """A source whose images each belong to one of several named classes, by the column "label"."""

    class_names: Sequence[str]


@dataclass(frozen=True)
class Dataset:
    """A dataset with its splits, each opened on first use."""

    name: str  # as given: "pets:/data/pets", "builtin:stamps", "data/mine.csv"; results are stored under it
    openers: Openers  # "test" is always there
    templates: str = "plain"  # name of a template set
    metric: str = "top1"  # the dataset's convention, or "mean_per_class"
    _opened: dict[str, PairSource] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def split(self, which: str) -> PairSource:
        """Open a split, once."""
        if which not in self.openers:
            raise UserError(
                f"'{self.name}' has no {which} split. It has: {', '.join(self.openers)}."
            )
        if which not in self._opened:
            source = self.openers[which]()
            if len(source) == 0:
                raise UserError(
                    f"'{self.name}' has no pairs in its {which} split. Use another dataset."
                )
            self._opened[which] = source
        return self._opened[which]


def open_dataset(
    dataset: str | Path | PairSource | Items | Dataset,
    *,
    label_column: str | None = None,
    columns: Columns = DEFAULT,
    sources: Sources = NO_SOURCES,
    captioned: bool = True,
) -> Dataset:
    """Open a dataset by name, or wrap an open source; the test split is opened immediately.

    Args:
        dataset: ``NAME:/path`` with a name in `NAMED`, such as "pets:/data/pets"; a table, which has classes where it
            has a column of labels; anything else that `open_source` opens, also a Python object; or an open dataset.
        label_column: A table's column; None: "label", "class", "class_name" or "category".
        columns: The other columns of a table, see `open_source`.
        sources: Python objects that a name may stand for, see `open_source`.
        captioned: Whether captions are used; if not, those of a table with `label_column` are not read.
    """
    if label_column is not None and not captioned:
        columns = replace(columns, caption=None)
    if isinstance(dataset, str | Path):
        dataset = _by_name(str(dataset), label_column, columns, sources)
    elif not isinstance(dataset, Dataset):
        if label_column is not None:
            raise UserError(
                f"label_column is for tables, not for a {type(dataset).__name__}. Remove it."
            )
        dataset = _dataset_of(open_source(dataset, columns))
    dataset.split("test")
    return dataset


def with_classes(source: PairSource) -> LabeledSource:
    """Check that a source has classes."""
    if "label" not in source.columns:
        raise UserError(
            f"'{source.name}' has no classes. Use a dataset with labels, or the task 'retrieval'."
        )
    labels = np.asarray(source.columns["label"])
    count = len(source.class_names or ())
    low = labels.min(initial=0)
    high = labels.max(initial=0)
    if len(labels) != len(source) or count < 2 or low < 0 or high >= count:
        raise UserError(
            f"'{source.name}' has {len(labels)} labels, from {low} to {high}, and {count} `class_names` for "
            f"{len(source)} pairs. Classification needs one label per pair and at least two classes, numbered from 0."
        )
    return cast(LabeledSource, source)


def _by_name(given: str, label_column: str | None, columns: Columns, sources: Sources) -> Dataset:
    name, colon, path = given.partition(":")
    # --- a known dataset in a folder
    if name in NAMED and colon and label_column is None:
        named = NAMED[name]
        root = Path(path).expanduser()
        if not path or not root.is_dir():
            raise UserError(
                f"There is no folder '{path}'. Write '{name}:PATH'; expected there: {named.files}."
            )
        readers = named.open(name, root)
        openers = {
            which: partial(_read, given, named.files, reader) for which, reader in readers.items()
        }
        return Dataset(given, openers, named.templates, named.metric)
    # --- a table with labels or splits
    table = find_table(given)
    if label_column is not None and table is None:
        raise UserError(
            f"--label-column {label_column} requires a table, but '{given}' is not a table."
        )
    if table is not None:
        labeled = labeled_table(table, label_column, columns)
        if labeled is not None:
            return Dataset(given, labeled)
    # --- anything else that is a source; one letter before a colon is a Windows drive
    known = given.startswith(PREFIX) or given in sources or names_plugin(given)
    known = known or Path(given).expanduser().exists()
    if table is None and colon and re.fullmatch(r"[\w-]{2,}", name) and not known:
        raise unknown("dataset", name, {*NAMED, BUILTIN, *plugins("sources")})
    return _dataset_of(open_source(given, columns, sources), given)


def _dataset_of(source: PairSource, name: str = "") -> Dataset:
    """A dataset of the pairs of the split "test" of a source that has one, else of all."""
    name = name or source.name
    emoji = source.name.startswith(("builtin:emoji", "builtin:icons"))
    splits = splits_of(source)
    if "test" in splits:
        source = Subset(source, splits["test"], f"{source.name} (test)")
    openers = {**source.other_splits, "test": lambda: source}
    return Dataset(name, openers, "emoji" if emoji else "plain")


def _read(name: str, files: str, read: Callable[[], PairSource]) -> PairSource:
    """Call a reader, and turn its errors about missing, damaged or unexpected files into a `UserError`."""
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # readers of other libraries raise anything for a damaged file
        reason = printable(str(error).split(" You can use download")[0].rstrip("."))
        raise UserError(
            f"The files of '{name}' are incomplete, damaged or not the published ones ({type(error).__name__}: "
            f"{reason}). Expected in that folder: {files}. Unpack the original archives."
        ) from error
