"""Classify images: a probability of each class that the user names."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from declip.data.columns import DEFAULT, Columns
from declip.data.images.decode import EXTENSIONS
from declip.data.pair import LazyImage, PairSource, SkipCounter
from declip.data.sources.open import ImageSource, open_images, open_source
from declip.data.sources.python_items import Items
from declip.errors import UserError, check_range
from declip.evaluation.encode import Encoder, encode_batches
from declip.evaluation.few_shot import joint_encoder
from declip.evaluation.zero_shot import class_features, logit_scale, read_templates
from declip.interchange.read import load
from declip.io.atomic import csv_path, csv_table
from declip.io.text import plain_cell
from declip.models.inference import Engine, Precision, fingerprint
from declip.search.class_names import NONE, read_options
from declip.search.classifier import Classifier


@dataclass(frozen=True)
class Prediction:
    """The most probable class of an image, and the probability of each class."""

    image: str  # its key
    best: str
    probability: float
    probabilities: dict[str, float]


@dataclass
class Classification:
    """The classes of the images of a source; `predictions` is empty if they were written or passed to a function."""

    counts: dict[str, int]  # images of each class
    skipped: SkipCounter = field(default_factory=SkipCounter)
    predictions: list[Prediction] = field(default_factory=list)
    classifier: Classifier | None = None  # None by names alone

    def summary(self) -> str:
        """One line for the classes, the most frequent first, and one for each reason of images left out."""
        counts = Counter(self.counts)
        classes = ", ".join(f"{count:,} {name}" for name, count in counts.most_common(20) if count)
        left_out = (f"Left out: {line}" for line in self.skipped.lines())
        return "\n".join([f"{counts.total():,} images: {classes}{', …' * (len(+counts) > 20)}", *left_out])


def classify(
    model: str | Path | Encoder,
    images: str | Path | PairSource | Items,
    classes: str | Path | Sequence[str] | None = None,
    *,
    examples: str | Path | PairSource | Items | None = None,
    head: str | Path | Classifier | None = None,
    reject: bool = False,
    label_column: str | None = None,
    templates: str | Sequence[str] = "plain",
    out: str | Path | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    columns: Columns = DEFAULT,
    device: str = "auto",
    precision: Precision = "auto",
    engine: Engine = "torch",
    progress: bool = False,
    on_prediction: Callable[[Prediction], object] | None = None,
) -> Classification:
    """Classify images into classes that you name. With `out`, memory does not grow with the number of images.

    Args:
        images: A folder, a file, a pattern such as "photos/*.jpg", or any source; images need no captions.
        classes: Names, a file with one per line, or a string of names with commas; by default those of the examples.
        examples, label_column: Labeled images of some or all of the classes, as for `declip.Classifier.fit`.
        head: A fitted classifier or its file, instead of classes and examples.
        reject: Assign images unlike the examples to "none of these".
        templates: Name of a template set, or templates with ``{}`` for the class.
        out: A .csv file for the probability of every class.
        precision, engine: As in `declip.load`; a model that is given as an object stays as it is.
        on_prediction: Called with each prediction, in the order of the images.

    Examples:
        >>> found = declip.classify("runs/demo", "photos", ["red", "blue"], workers=0)
        >>> sum(found.counts.values())
        8
    """
    # --- input, before the model is loaded
    check_range("batch_size", batch_size, 1)
    names = read_options(classes, examples, head, reject) or []
    prompts = read_templates(templates)[1]
    source, path = _open(images, replace(columns, caption=None)), None if out is None else csv_path(out)
    classifier = Classifier.load(head) if isinstance(head, str | Path) else head
    workers = workers or (None if isinstance(images, str | Path) and workers is None else 0)
    encoder = load(model, device, precision, engine) if isinstance(model, str | Path) else model
    # --- scores of classes
    options: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "progress": progress}
    if examples is not None:
        classifier = Classifier.fit(encoder, names, examples, templates=prompts, label_column=label_column, **options)
    scorer = _scorer(encoder, classifier, names, prompts, batch_size)
    if reject:
        scorer = scorer._replace(threshold=_threshold(classifier))
    result = Classification(dict.fromkeys([*scorer.names, *([NONE] if reject else [])], 0), classifier=classifier)
    # --- classify and write batch by batch
    batches = [range(start, min(start + batch_size, len(source))) for start in range(0, len(source), batch_size)]
    stream = encode_batches(encoder, source, _read, batches, workers, progress, scorer.encode)
    _predict(scorer, stream, result, path, on_prediction)
    return result


def _predict(
    scorer: "_Scorer",
    stream: Iterable[tuple[Tensor, list[str], SkipCounter]],
    result: Classification,
    path: Path | None,
    on_prediction: Callable[[Prediction], object] | None,
) -> None:
    """Add predictions to a result batch by batch, and write them to a table, which appears whole or not at all."""
    header = ("image", "class", "probability", *map(plain_cell, scorer.names))
    with nullcontext() if path is None else csv_table(path, header) as table:
        for vectors, keys, broken in stream:
            result.skipped.merge(broken)
            for prediction in scorer.predict(keys, vectors) if keys else ():
                result.counts[prediction.best] += 1
                if table is not None:
                    table.writerow(_cells(prediction))
                if on_prediction is not None:
                    on_prediction(prediction)
                elif table is None:
                    result.predictions.append(prediction)
        if not any(result.counts.values()):
            count = sum(result.skipped.counts.values())
            raise UserError(f"None of the {count:,} images can be used: {result.skipped.explanation()}")


def _threshold(classifier: Classifier | None) -> float:
    """The largest score below which an image is of no class."""
    if classifier is None or classifier.rejection is None:
        raise UserError("--reject requires examples of three classes or more, with two images of one or more.")
    return classifier.rejection.threshold


def _cells(prediction: Prediction) -> list[str]:
    numbers = prediction.probability, *prediction.probabilities.values()
    return [plain_cell(prediction.image), plain_cell(prediction.best), *(f"{number:.6g}" for number in numbers)]


class _Scorer(NamedTuple):
    """Scores of classes, whose softmax is the probability."""

    names: Sequence[str]
    encode: Callable[[Tensor], Tensor] | None  # pixels to vectors; None: `Encoder.encode_image`
    score: Callable[[Tensor], Tensor]  # vectors (n, d) to (n, C)
    threshold: float = -math.inf  # of the largest score, below which an image is of no class

    def predict(self, keys: Sequence[str], vectors: Tensor) -> Iterator[Prediction]:
        """The predictions for images with keys and vectors (n, d)."""
        scores = self.score(vectors).double()
        strange = scores.amax(dim=1) < self.threshold
        for key, own, other in zip(keys, scores.softmax(dim=1).tolist(), strange.tolist(), strict=True):
            probabilities = dict(zip(self.names, own, strict=True))
            best = max(probabilities, key=probabilities.__getitem__)
            yield Prediction(key, NONE if other else best, probabilities[best], probabilities)


def _scorer(
    encoder: Encoder, classifier: Classifier | None, names: Sequence[str], prompts: Sequence[str], batch_size: int
) -> _Scorer:
    """The scores of a classifier; without one CLIP's zero-shot classification, the logit scale times the cosines."""
    if classifier is not None:
        if fingerprint(encoder) != classifier.model:
            raise UserError("The head was fitted to another model. Give that model, or fit it again with --examples.")
        return _Scorer(classifier.classes, joint_encoder(encoder)[0], classifier.head.scores)
    encoder.tokenize([""])  # a model without a text tower fails before processes start
    texts, scale = class_features(encoder, names, prompts, batch_size=batch_size).double(), logit_scale(encoder)
    return _Scorer(names, None, lambda vectors: scale * vectors.double() @ texts.T)


def _read(source: ImageSource, place: int) -> tuple[LazyImage, str]:
    return source.read_lazy(place).image, source.key(place)


def _open(images: str | Path | PairSource | Items, columns: Columns) -> ImageSource:
    """Open images: also a single file, or the files of a pattern."""
    if not isinstance(images, str | Path):
        return ImageSource(open_source(images, columns))
    path = Path(images).expanduser()
    names = [str(path)] if path.exists() else sorted(glob(str(path), recursive=True))
    if files := [name for name in names if name.lower().endswith(EXTENSIONS)]:
        return ImageSource(open_source(files), captioned=False)
    return open_images(images, columns)
