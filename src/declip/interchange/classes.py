"""Classes of an image classifier as image-text pairs: weight recycling (arXiv 2605.22484).

The row of a class in the classifier's weights lies where images of the class lie, and the class has a name.
"""

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from declip.errors import UserError

TABLES = {".csv": ",", ".tsv": "\t"}
"""Suffixes of tables with the columns name and definition; any other file has one name a line."""


@dataclass(frozen=True)
class Classes:
    """Rows of a classifier with the names of its classes."""

    rows: Tensor  # (c, v), the classifier's weights, for the pooled features of the image tower
    mean: Tensor  # (v,), mean feature of images; zeros where nobody measured it
    names: tuple[str, ...] = ()  # of every class; empty if unknown
    definitions: tuple[str, ...] = ()  # of every class, "" if it has none
    # Of the images that the mean was measured on, and of a model without pairs
    size: int | None = None
    # (t, w) of `texts` by the text tower of the same weights, if they are at hand
    features: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, mean: Tensor | None = None, size: int | None = None) -> "Classes":
        """Classes of a classifier's weights (c, v); ImageNet's names if it has as many classes as a set of ImageNet."""
        import timm  # a second

        rows = rows.detach().float()  # (c, v)
        if mean is None:
            mean = torch.zeros(rows.shape[1])
        classes = cls(rows, mean.float(), size=size)
        subset = timm.data.infer_imagenet_subset({"num_classes": len(rows)})
        if subset is None:
            return classes
        info = timm.data.ImageNetInfo(subset)
        names = info.label_descriptions(detailed=False)
        detailed = info.label_descriptions(detailed=True)  # NAME: DEFINITION
        definitions = [
            text.removeprefix(f"{name}: ") for name, text in zip(names, detailed, strict=True)
        ]
        return replace(classes, names=tuple(names), definitions=tuple(definitions))

    def with_names(self, file: str | Path) -> "Classes":
        """Replace the names by those of a file, see `read_names`."""
        names, definitions = read_names(Path(file))
        if len(names) != len(self.rows):
            raise UserError(
                f"'{file}' has {len(names):,} names for {len(self.rows):,} classes. Give one for each."
            )
        return replace(self, names=names, definitions=definitions, features=None)

    def with_features(self, file: Path) -> "Classes":
        """Add features of the texts that were measured before, if they are of these texts."""
        texts, _ = self.texts()
        with safe_open(file, "pt") as stored:
            # Another version of timm has other names
            if stored.metadata()["texts"] != texts_digest(texts):
                return self
            features = stored.get_tensor("features").float() * stored.get_tensor("scales")
        return replace(self, features=features)

    def texts(self) -> tuple[list[str], Tensor]:
        """Names and definitions as texts, and the class of each, (t,) int64."""
        texts = list(self.names)
        numbers = list(range(len(self.names)))
        for number, definition in enumerate(self.definitions):
            if definition:
                texts.append(f"{self.names[number]}: {definition}")
                numbers.append(number)
        return texts, torch.tensor(numbers, dtype=torch.int64)


def texts_digest(texts: Sequence[str]) -> str:
    """Hash texts in their order."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def read_names(file: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read names and definitions of classes: one name a line, or a .csv or .tsv table with name and definition."""
    try:
        lines = file.expanduser().read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"Cannot read the class names (finetune.class_names) in '{file}': {error}."
        ) from error
    separator = TABLES.get(file.suffix.lower())
    if separator is None:
        names = [line.strip() for line in lines]
        definitions = [""] * len(lines)
    else:
        rows = list(csv.DictReader(lines, delimiter=separator))
        if not rows or "name" not in rows[0]:
            raise UserError(
                f"'{file}' (finetune.class_names) has no column 'name'. Give a table name,definition."
            )
        names = [(row["name"] or "").strip() for row in rows]
        definitions = [(row.get("definition") or "").strip() for row in rows]
    if "" in names:
        raise UserError(
            f"Name {names.index('') + 1} in '{file}' (finetune.class_names) is empty. Name every class."
        )
    for name, count in Counter(names).most_common(1):
        if count > 1:
            raise UserError(
                f"'{file}' (finetune.class_names) has '{name}' {count} times. Give each class another name."
            )
    return tuple(names), tuple(definitions)
