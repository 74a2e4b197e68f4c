"""Classify images by the names of classes, by example images, or by a classifier that was fitted to both."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import BaseModel, Field
from safetensors import safe_open
from torch import Tensor

from declip.data.columns import DEFAULT, Columns
from declip.data.images.decode import EXTENSIONS
from declip.data.pair import LazyImage, PairSource, SkipCounter, printable
from declip.data.sources.open import ImageSource, open_images
from declip.data.sources.python_items import Items
from declip.data.sources.subset import groups_of
from declip.data.sources.table import find_table, open_rows
from declip.errors import UserError, check_range
from declip.evaluation.datasets import LabeledSource, open_dataset, with_classes
from declip.evaluation.encode import Batching, check_widths, encode_batches, encode_images
from declip.evaluation.few_shot import (
    Examples,
    FewShotForm,
    FewShotHead,
    fit_few_shot,
    joint_encoder,
)
from declip.evaluation.leakage import leaking_column
from declip.evaluation.prompt_sets import read_templates
from declip.evaluation.results import Measure
from declip.evaluation.zero_shot import class_features, logit_scale
from declip.interchange.read import loaded
from declip.io.atomic import csv_path, save_tensors
from declip.io.outputs import CLASSIFIED, csv_table, output_file
from declip.io.text import one_line, percent, plain_cell
from declip.models.encoder import Encoder
from declip.models.fingerprint import fingerprint
from declip.models.precision import Precision
from declip.search.checks import check_classes
from declip.search.class_words import add_classes

KEY = "declip.classifier"  # of the metadata of a file


class _Stored(BaseModel):
    """The metadata of a file."""

    classes: tuple[str, ...] = Field(min_length=2)
    counts: tuple[int, ...]
    width: int = Field(ge=0)
    mixture: list[tuple[float, float, float]] = Field(min_length=1)  # κ, penalty, factor
    accuracy: tuple[float, int] | None
    shots: float = 0.0
    unmeasured: int = Field(default=0, ge=0)
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
    model: str  # fingerprint
    skipped: SkipCounter  # example images that could not be read
    # Column of the examples that should be their group, see `leaking_column`
    leaking: str | None = None

    @classmethod
    def fit(
        cls,
        model: str | Path | Encoder,
        classes: Sequence[str] | None = None,
        examples: str | Path | PairSource | Items | None = None,
        *,
        templates: str | Sequence[str] = "plain",
        label_column: str | None = None,
        columns: Columns = DEFAULT,
        batch_size: int = 256,
        workers: int = 0,
        device: str = "auto",
        progress: bool = False,
    ) -> Self:
        """Fit a classifier.

        Args:
            classes: Names; by default those of the examples. A class may have no example.
            examples: A folder with a folder of images for each class, a table with a column of labels, or another
                source with classes; of one with splits the training split.
            templates: A shipped template set, or sentences with ``{}`` for the class.
            columns: Of a table of examples. Images with equal cells in its `group` are left out together.
        """
        source = None
        if examples is not None:
            source = _open_examples(examples, label_column, columns)
        known = tuple(classes or (source.class_names if source else ()))
        if len(known) < 2:
            raise UserError(
                "A classifier needs two classes or more. Name them, or give examples of them."
            )
        encoder = loaded(model, device)
        names = _name_features(encoder, known, read_templates(templates)[1], batch_size)
        encode, width = joint_encoder(encoder)
        no_images = torch.empty(0, width + names.shape[1])
        given = Examples(no_images, torch.empty(0).long(), names, width)
        skipped = SkipCounter()
        groups = None
        leaking = None
        if source is not None:
            number = _numbers(known, source.class_names)
            how = Batching(batch_size, workers, progress)
            features = encode_images(encoder, source, how, encode=encode, exact=False)
            own_numbers = source.columns["label"][features.indices]
            labels = torch.from_numpy(number[own_numbers])
            skipped = features.skipped
            given = Examples(features.images, labels, names, width)
            groups = np.arange(len(labels))
            if columns.group is not None:
                named = groups_of(source)[features.indices]
                groups = np.where(named == 0, -1 - groups, named)
            leaking = leaking_column(
                source, features.indices.tolist(), features.images, groups, len(known)
            )
        head = fit_few_shot(given, groups=groups)
        counts = torch.bincount(given.labels, minlength=len(known))
        return cls(known, tuple(counts.tolist()), head, fingerprint(encoder), skipped, leaking)

    def summary(self) -> str:
        """The examples, the settings, and what cross-validation says."""
        head = self.head
        none = sum(not count for count in self.counts)
        lines = [
            f"{sum(self.counts):,} examples of {len(self.counts) - none:,} classes, {none:,} more by name alone"
        ]
        if head.name_weight >= 0.1:
            lines[0] += f"; a name counts as {head.name_weight:.2g} images"
        if head.accuracy is None and any(self.counts):
            needed = "two classes with two examples or more, of different objects"
            lines.append(f"No accuracy: some examples must be left out, so it needs {needed}.")
        if head.accuracy is not None:
            low, high = map(percent, head.accuracy.interval)
            lines.append(
                f"Accuracy with {head.shots:.3g} examples per class, on those that were left out: "
                f"{percent(head.accuracy.value)} ({low} to {high}, n = {head.accuracy.n:,}, chance "
                f"{percent(head.accuracy.chance)}). The classifier was then fitted to all examples."
            )
            if head.unmeasured:
                lines.append(
                    "Classes that are not part of the accuracy, because the examples of each show one "
                    f"object: {head.unmeasured:,}."
                )
            if self.leaking is not None:
                leaking = printable(self.leaking)
                lines.append(
                    f"Images of equal '{leaking}' are alike, but were not left out together: the "
                    f"accuracy is too high. Add --group-column {leaking}, in Python "
                    f"columns=Columns(group={leaking!r})."
                )
        return "\n".join(lines + [f"Left out: {line}" for line in self.skipped.lines()])

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write a safetensors file; one that exists is replaced with `overwrite`."""
        head = self.head
        mixture = [(*form, factor) for form, factor in head.mixture.items()]
        accuracy = None
        if head.accuracy is not None:
            accuracy = (head.accuracy.value, head.accuracy.n)
        stored = _Stored(
            classes=self.classes,
            counts=self.counts,
            model=self.model,
            width=head.width,
            mixture=mixture,
            accuracy=accuracy,
            shots=head.shots,
            unmeasured=head.unmeasured,
        )
        with output_file(Path(path).expanduser(), "--save", overwrite) as target:
            save_tensors(
                {"weight": head.weight, "center": head.center},
                target,
                {KEY: stored.model_dump_json()},
            )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a file of `save`; raises `UserError` for another or a damaged one."""
        path = Path(path).expanduser()
        try:
            with safe_open(path, "pt") as file:
                stored = _Stored.model_validate_json((file.metadata() or {})[KEY])
                weight = file.get_tensor("weight").float()
                center = file.get_tensor("center").float()
            count, columns = weight.shape
            finite = bool(weight.isfinite().all() and center.isfinite().all())
            fits = stored.width <= columns and center.shape == (columns,)
            if not (finite and fits) or {count} != {len(stored.classes), len(stored.counts)}:
                raise ValueError("the sizes do not fit, or numbers are not finite")
        except Exception as error:  # a stranger's file; safetensors has its own classes
            raise UserError(
                f"'{path}' is not a head of declip classify: {one_line(error, 200)}."
            ) from error
        mixture = {FewShotForm(*form): factor for *form, factor in stored.mixture}
        accuracy = None
        if stored.accuracy is not None:
            value, n = stored.accuracy
            accuracy = Measure("examples", value, 1 / count, n)
        measured = (accuracy, stored.shots, stored.unmeasured)
        head = FewShotHead(weight, center, stored.width, mixture, *measured)
        return cls(stored.classes, stored.counts, head, stored.model, SkipCounter())


def _open_examples(
    examples: str | Path | PairSource | Items, label_column: str | None, columns: Columns
) -> LabeledSource:
    """Open labeled images: of folders of classes, or of a table where one of its columns is named."""
    columns = replace(columns, caption=None)
    table = None
    if isinstance(examples, str | Path):
        table = find_table(examples)
        if table is None and columns.group is not None:
            raise UserError(
                f"--group-column {columns.group} requires a table of examples, but '{examples}' is none."
            )
        by_column = label_column is not None or columns.group is not None
        folder = Path(examples).expanduser()
        if folder.is_dir() and not (by_column and table is not None):
            examples = f"folder:{folder}"
    dataset = open_dataset(examples, label_column=label_column, columns=columns, captioned=False)
    source = dataset.split("train" if "train" in dataset.openers else "test")
    if table is not None and "label" not in source.columns:
        names = ", ".join(f"'{printable(name)}'" for name in open_rows(table).columns[:30])
        raise UserError(
            f"The table '{table}' of examples has no column of classes, such as 'label'. Its columns: {names}. "
            "Name one: --label-column NAME."
        )
    return with_classes(source)


def _numbers(classes: tuple[str, ...], given: Any) -> np.ndarray:
    """The number of each class of the examples among the classes; raises `UserError` for one that is not among them."""
    numbers = dict[str, int]()
    for number, name in enumerate(classes):
        first = numbers.setdefault(name.replace("_", " ").casefold(), number)
        if first != number:
            both = f"'{printable(classes[first])}' and '{printable(name)}'"
            raise UserError(f"The classes {both} differ only in case or '_'. Rename one.")
    found = list[int]()
    strange = list[str]()
    for name in map(str, given):
        key = name.replace("_", " ").casefold()
        if key in numbers:
            found.append(numbers[key])
        else:
            strange.append(name)
    if strange:
        raise UserError(
            f"The examples have {len(strange):,} classes, such as '{printable(strange[0])}', that --classes lacks. "
            "Name them too."
        )
    return np.array(found, dtype=np.int64)


@dataclass(frozen=True)
class Prediction:
    """The most probable class of an image, and the probability of each class."""

    image: str  # its key
    best: str
    probability: float
    probabilities: dict[str, float]

    def cells(self) -> list[str]:
        """The row of a table."""
        numbers = (self.probability, *self.probabilities.values())
        return [
            plain_cell(self.image),
            plain_cell(self.best),
            *(f"{number:.6g}" for number in numbers),
        ]


@dataclass
class Classification:
    """The classes of the images of a source; `predictions` is empty if they were written or passed to a function."""

    counts: dict[str, int]  # images of each class
    skipped: SkipCounter = field(default_factory=SkipCounter)
    predictions: list[Prediction] = field(default_factory=list)
    classifier: Classifier | None = None  # None by names alone

    def summary(self) -> str:
        """One line for the classes, the most frequent first, and one for each reason of images left out."""
        counts = +Counter(self.counts)  # without zeros
        classes = [f"{count:,} {printable(name)}" for name, count in counts.most_common(20)]
        if len(counts) > 20:
            classes.append("…")
        lines = [f"{counts.total():,} images: {', '.join(classes)}"]
        return "\n".join(lines + [f"Left out: {line}" for line in self.skipped.lines()])


def classify(
    model: str | Path | Encoder,
    images: str | Path | PairSource | Items,
    classes: str | Path | Sequence[str] | None = None,
    *,
    examples: str | Path | PairSource | Items | None = None,
    head: str | Path | Classifier | None = None,
    label_column: str | None = None,
    templates: str | Sequence[str] = "plain",
    out: str | Path | None = None,
    overwrite: bool = False,
    batch_size: int = 256,
    workers: int | None = None,
    columns: Columns = DEFAULT,
    device: str = "auto",
    precision: Precision = "auto",
    progress: bool = False,
    on_prediction: Callable[[Prediction], object] | None = None,
) -> Classification:
    """Classify images into classes that you name. With `out`, memory does not grow with the number of images.

    Args:
        images: A folder, a file, a pattern such as "photos/*.jpg", or any source; images need no captions.
        classes: Names, a file with one per line, or a string of names with commas; by default those of the examples.
        examples, label_column: Labeled images of some or all of the classes, as for `declip.Classifier.fit`.
        head: A fitted classifier or its file, instead of classes and examples.
        templates: Name of a template set, or templates with ``{}`` for the class.
        out: A .csv file for the probability of every class.
        overwrite: Replace `out` if it exists.
        columns: Of a table of images and of one of examples; `group` of examples alone, see `declip.Classifier.fit`.
        precision: As in `declip.load`; a model that is given as an object stays as it is.
        on_prediction: Called with each prediction, in the order of the images.

    Examples:
        >>> result = declip.classify("runs/demo", "photos", ["red", "blue"], workers=0)
        >>> sum(result.counts.values())
        8
    """
    # --- input, before the model is loaded
    check_range("batch_size", batch_size, 1)
    names = check_classes(classes, examples, head, out, overwrite=overwrite) or []
    prompts = read_templates(templates)[1]
    source = _open(images, replace(columns, caption=None, group=None))
    path = None
    if out is not None:
        path = csv_path(out)
    classifier = Classifier.load(head) if isinstance(head, str | Path) else head
    if workers is None and not isinstance(images, str | Path):
        workers = 0  # the object may not work in another process
    encoder = loaded(model, device, precision)
    # --- scores of classes
    if examples is not None:
        options: dict[str, Any] = {"label_column": label_column, "columns": columns}
        options |= {"batch_size": batch_size, "workers": workers, "progress": progress}
        classifier = Classifier.fit(encoder, names, examples, templates=prompts, **options)
    known, encode, score = _scorer(encoder, classifier, names, prompts, batch_size)
    result = Classification(dict.fromkeys(known, 0), classifier=classifier)
    # --- classify and write batch by batch; the table appears complete or not at all
    numbers = range(len(source))
    batches = [numbers[start : start + batch_size] for start in numbers[::batch_size]]
    stream = encode_batches(encoder, source, _read, batches, workers, progress, encode)
    header = (*CLASSIFIED, *map(plain_cell, known))
    with nullcontext() if path is None else csv_table(path, header, overwrite) as table:
        for vectors, keys, broken in stream:
            result.skipped.merge(broken)
            for prediction in _predictions(keys, known, vectors, score):
                result.counts[prediction.best] += 1
                if table is not None:
                    table.writerow(prediction.cells())
                if on_prediction is not None:
                    on_prediction(prediction)
                elif table is None:
                    result.predictions.append(prediction)
        if not any(result.counts.values()):
            raise UserError(
                f"None of the {result.skipped.total:,} images can be used: {result.skipped.explanation()}"
            )
    return result


def _predictions(
    keys: Sequence[str],
    classes: Sequence[str],
    vectors: Tensor,
    score: Callable[[Tensor], Tensor],
) -> Iterator[Prediction]:
    """The predictions of images by their vectors (n, d)."""
    if not keys:
        return
    softmax = score(vectors).double().softmax(dim=1)  # (n, C)
    for key, own in zip(keys, softmax.tolist(), strict=True):
        probabilities = dict(zip(classes, own, strict=True))
        best = max(probabilities, key=probabilities.__getitem__)
        yield Prediction(key, best, probabilities[best], probabilities)


def _scorer(
    encoder: Encoder,
    classifier: Classifier | None,
    names: Sequence[str],
    prompts: Sequence[str],
    batch_size: int,
) -> tuple[Sequence[str], Callable[[Tensor], Tensor] | None, Callable[[Tensor], Tensor]]:
    """Classes, the encoder of pixels (None: `Encoder.encode_image`), and the scores (n, C) of vectors (n, d).

    The softmax of scores is the probability. Without a classifier, it is CLIP's: logit scale times cosines.
    """
    if classifier is not None:
        if fingerprint(encoder) != classifier.model:
            raise UserError(
                "The head was fitted to another model. Give that model, or fit it again with --examples."
            )
        return classifier.classes, joint_encoder(encoder)[0], classifier.head.scores
    encoder.tokenize([""])  # a model without a text tower fails before processes start
    texts = _name_features(encoder, names, prompts, batch_size).double()
    scale = logit_scale(encoder)

    def scores(vectors: Tensor) -> Tensor:
        check_widths(vectors, texts)
        return scale * vectors.double() @ texts.T

    return names, None, scores


def _name_features(
    encoder: Encoder, names: Sequence[str], prompts: Sequence[str], batch_size: int
) -> Tensor:
    """(C, d) of length 1, the features of class names; a word such as "animal" is compared as images too."""
    vectors = class_features(encoder, names, prompts, Batching(batch_size))
    named = zip(vectors, names, strict=True)
    return torch.stack([add_classes(*pair, encoder, lambda: encoder) for pair in named])


def _read(source: ImageSource, index: int) -> tuple[LazyImage, str]:
    image = source[index]
    return image.open(), image.key


def _open(images: str | Path | PairSource | Items, columns: Columns) -> ImageSource:
    """Open images: also a single file, or the files of a pattern."""
    if isinstance(images, str | Path):
        path = Path(images).expanduser()
        names = [str(path)]
        if not path.exists():
            names = sorted(glob(str(path), recursive=True))
        files = [name for name in names if name.lower().endswith(EXTENSIONS)]
        if files:
            images = files
    return open_images(images, columns)
