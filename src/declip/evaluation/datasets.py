"""What is measured on: opening a source by its name, and the class names and templates that belong to it."""

from collections.abc import Mapping, Sequence
from typing import Protocol, cast, runtime_checkable

import numpy as np

from declip.data.pairs import PairSource
from declip.data.sources import open_source
from declip.errors import UserError

TEMPLATES: Mapping[str, str] = {
    "builtin:emoji": "emoji",
}
"""Template set by the beginning of a source's name; every other source gets `DEFAULT_TEMPLATES`."""

DEFAULT_TEMPLATES = "plain"


@runtime_checkable
class LabelledSource(PairSource, Protocol):
    """A source whose images each belong to one of several named classes."""

    labels: np.ndarray
    class_names: Sequence[str]


def open_dataset(on: "str | PairSource") -> PairSource:
    """Open a source by its name; one that is open already is handed back.

    Args:
        on: What `declip.data.sources.open_source` opens, or an open source.

    Raises:
        UserError: there is no such source, or it is empty.
    """
    source = open_source(on) if isinstance(on, str) else on
    if len(source) == 0:
        raise UserError(f"'{source.name}' holds no pair. Nothing can be measured on it.")
    return source


def with_classes(source: PairSource) -> LabelledSource:
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
    return cast(LabelledSource, source)


def templates_of(source: PairSource) -> str:
    """The name of the template set that belongs to a source."""
    for beginning, templates in TEMPLATES.items():
        if source.name.startswith(beginning):
            return templates
    return DEFAULT_TEMPLATES
