"""A classifier from class names and example images, which can be saved and used on other images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel, Field
from safetensors import safe_open

from declip.data.pair import PairSource, SkipCounter
from declip.data.sources.python_items import Items
from declip.errors import UserError
from declip.evaluation.datasets import LabeledSource, open_dataset, with_classes
from declip.evaluation.encode import Encoder, encode_source
from declip.evaluation.few_shot import (
    Examples,
    FewShotForm,
    FewShotHead,
    Rejection,
    choose_threshold,
    fit_few_shot,
    joint_encoder,
)
from declip.evaluation.results import Measure
from declip.evaluation.zero_shot import class_features, read_templates
from declip.interchange.read import load
from declip.io.atomic import atomic_write, save_tensors
from declip.io.text import one_line, percent
from declip.models.inference import fingerprint
from declip.search.class_names import NONE

KEY = "declip.classifier"  # of the metadata of a file
FEWEST = 3  # classes with images that leaving one out requires


class _Stored(BaseModel, extra="forbid"):
    """The metadata of a file."""

    classes: tuple[str, ...] = Field(min_length=2)
    counts: tuple[int, ...]
    width: int = Field(ge=0)
    mixture: list[tuple[float, float, float]] = Field(min_length=1)  # κ, penalty, factor
    accuracy: tuple[float, int] | None
    rejection: Rejection | None
    model: str


@dataclass(frozen=True)
class Classifier:
    """Class names and example images of some classes, fitted in closed form to a model's frozen features.

    Examples:
        >>> declip.Classifier.fit("runs/demo", examples="labels.csv").classes
        ('blue', 'red')
    """

    classes: tuple[str, ...]
    counts: tuple[int, ...]  # example images of each class
    head: FewShotHead
    rejection: Rejection | None  # None with fewer than three classes of two images
    model: str  # fingerprint
    skipped: SkipCounter  # example images that could not be read

    @classmethod
    def fit(
        cls,
        model: str | Path | Encoder,
        classes: Sequence[str] | None = None,
        examples: str | Path | PairSource | Items | None = None,
        *,
        templates: str | Sequence[str] = "plain",
        label_column: str | None = None,
        batch_size: int = 256,
        workers: int = 0,
        device: str = "auto",
        progress: bool = False,
    ) -> Self:
        """Fit a classifier.

        Args:
            classes: Names; by default those of the examples. A class may have no example.
            examples: A folder with a folder of images for each class, a table with a column of labels, or another
                source with classes; of one with splits the training part.
            templates: A shipped template set, or sentences with ``{}`` for the class.
        """
        source = None if examples is None else _open_examples(examples, label_column)
        known = tuple(classes or (source.class_names if source else ()))
        if len(known) < 2:
            raise UserError("A classifier needs two classes or more. Name them, or give examples of them.")
        loaded = load(model, device) if isinstance(model, str | Path) else model
        names = class_features(loaded, known, read_templates(templates)[1], batch_size=batch_size)
        encode, width = joint_encoder(loaded)
        given = Examples(torch.empty(0, width + names.shape[1]), torch.empty(0).long(), names, width)
        skipped = SkipCounter()
        if source is not None:
            number = _numbers(known, source.class_names)
            options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress}
            found = encode_source(loaded, source, encode=encode, texts=False, **options)
            labels, skipped = torch.from_numpy(number[np.asarray(source.labels)[found.indices]]), found.skipped
            given = Examples(found.images, labels, names, width)
        head, counts = fit_few_shot(given), torch.bincount(given.labels, minlength=len(known))
        enough = head.accuracy is not None and int((counts > 0).sum()) >= FEWEST
        rejection = choose_threshold(given, head) if enough else None
        return cls(known, tuple(counts.tolist()), head, rejection, fingerprint(loaded), skipped)

    def summary(self) -> str:
        """The examples, the settings, and what cross-validation says."""
        head, none = self.head, sum(not count for count in self.counts)
        lines = [f"{sum(self.counts):,} examples of {len(self.counts) - none:,} classes, {none:,} more by name alone"]
        if head.name_weight >= 0.1:
            lines[0] += f"; a name counts as {head.name_weight:.2g} images"
        if head.accuracy is not None:
            low, high = map(percent, head.accuracy.interval)
            lines.append(
                f"Accuracy on examples that were left out: {percent(head.accuracy.value)} ({low} to {high}, n = "
                f"{head.accuracy.n:,}, chance {percent(head.accuracy.chance)})"
            )
        if (found := self.rejection) is not None:
            lines.append(
                f"'{NONE}': {percent(found.rejected)} of the examples of classes that were left out, "
                f"{percent(found.lost)} of the others (AUROC {found.auroc:.2f})"
            )
        return "\n".join(lines + [f"Left out: {line}" for line in self.skipped.lines()])

    def save(self, path: str | Path) -> None:
        """Write a safetensors file."""
        head = self.head
        own = {name: getattr(self, name) for name in ("classes", "counts", "rejection", "model")}
        mixture = [(*form, factor) for form, factor in head.mixture.items()]
        accuracy = None if head.accuracy is None else (head.accuracy.value, head.accuracy.n)
        stored = _Stored(**own, width=head.width, mixture=mixture, accuracy=accuracy)
        with atomic_write(Path(path).expanduser(), "choose another path with --save") as target:
            save_tensors({"weight": head.weight, "center": head.center}, target, {KEY: stored.model_dump_json()})

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of `save`; raises `UserError` for another or a damaged one."""
        path = Path(path).expanduser()
        try:
            with safe_open(path, "pt") as file:
                stored = _Stored.model_validate_json((file.metadata() or {})[KEY])
                weight, center = (file.get_tensor(name).float() for name in ("weight", "center"))
            count, columns = weight.shape
            whole = bool(weight.isfinite().all() and center.isfinite().all()) and stored.width <= columns
            if not whole or center.shape != (columns,) or {count} != {len(stored.classes), len(stored.counts)}:
                raise ValueError("the sizes do not fit, or numbers are not finite")
        except Exception as error:  # a stranger's file; safetensors has its own classes
            raise UserError(f"'{path}' is not a head of declip classify: {one_line(error, 200)}.") from error
        mixture = {FewShotForm(*form): factor for *form, factor in stored.mixture}
        accuracy = stored.accuracy and Measure("examples", stored.accuracy[0], 1 / count, stored.accuracy[1])
        head = FewShotHead(weight, center, stored.width, mixture, accuracy)
        return cls(stored.classes, stored.counts, head, stored.rejection, stored.model, SkipCounter())


def _open_examples(examples: str | Path | PairSource | Items, label_column: str | None) -> LabeledSource:
    """Open labeled images; a folder is one of folders of classes."""
    if isinstance(examples, str | Path) and (folder := Path(examples).expanduser()).is_dir():
        examples = f"folder:{folder}"
    dataset = open_dataset(examples, label_column=label_column)
    return with_classes(dataset.split("train" if "train" in dataset.openers else "test"))


def _numbers(classes: tuple[str, ...], given: Any) -> np.ndarray:
    """The number of each class of the examples among the classes; raises `UserError` for one that is not among them."""
    numbers = {name.replace("_", " ").casefold(): number for number, name in enumerate(classes)}
    keys = [str(name).replace("_", " ").casefold() for name in given]
    if strange := [name for name, key in zip(given, keys, strict=True) if key not in numbers]:
        raise UserError(
            f"The examples have {len(strange):,} classes, such as '{strange[0]}', that --classes lacks. Name them too."
        )
    return np.array([numbers[key] for key in keys], dtype=np.int64)
