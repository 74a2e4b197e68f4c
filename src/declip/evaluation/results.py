"""Results of evaluations: numbers with n and chance level, as JSON rows."""

import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import inf
from typing import Any, ClassVar, NamedTuple

import numpy as np
from pydantic import TypeAdapter

from declip.io.interval import wilson_interval
from declip.io.text import percent

DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}


class Measure(NamedTuple):
    """One score with its chance level and n; the same score of two models has the same `name`."""

    name: str
    value: float
    chance: float
    n: int
    majority: float | None = None

    @property
    def times_chance(self) -> float:
        if not self.chance:
            return inf
        return self.value / self.chance

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of a fraction of `n` independent trials."""
        return wilson_interval(self.value, self.n)


@dataclass(frozen=True)
class Result(ABC):
    """Base class of results; `skipped` counts the unreadable images by reason."""

    task: ClassVar[str]
    dataset: str
    skipped: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    @abstractmethod
    def measures(self) -> list[Measure]:
        """The scores for tables."""

    @property
    def headline(self) -> Measure:
        """The score by which models are compared."""
        return self.measures()[0]

    @property
    @abstractmethod
    def among(self) -> str:
        """The candidates of the headline."""

    def __str__(self) -> str:
        rows = (
            f"{m.name} {percent(m.value)} (chance {percent(m.chance)}, n = {m.n:,})"
            for m in self.measures()
        )
        return "\n  ".join([self.dataset, *rows])

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready row; `read_result` reads it back."""
        return {"task": self.task, **asdict(self)}


@dataclass(frozen=True)
class ClassificationResult(Result):
    """Base class of results on `n` test images of `classes` classes."""

    n: int
    classes: int

    @property
    def chance(self) -> float:
        return 1 / self.classes

    @property
    def among(self) -> str:
        majority = self.headline.majority
        largest = "" if majority is None else f", the largest with {percent(majority)}"
        return f"{self.classes:,} classes{largest}"

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "chance": self.chance}

    def _measure(
        self, name: str, value: float, first: int = 1, majority: float | None = None
    ) -> Measure:
        """Build the measure of images whose class ranks among the `first`."""
        return Measure(name, value, min(first, self.classes) / self.classes, self.n, majority)


@dataclass(frozen=True)
class ZeroShotResult(ClassificationResult):
    """Zero-shot classification."""

    task: ClassVar[str] = "zero-shot"
    top1: float
    top5: float
    mean_per_class: float  # mean of the top-1 of each class that has images
    templates: str = "plain"  # name of the prompt templates, or the templates themselves
    # Fraction of the most frequent class: top-1 of a model that always predicts it
    majority: float | None = None
    by_tokens: bool = False  # patches were compared with words, not embeddings

    def measures(self) -> list[Measure]:
        unbalanced = self.majority is not None and self.majority >= 1.1 * self.chance
        return [
            self._measure("top-1", self.top1, majority=self.majority if unbalanced else None),
            self._measure("top-5", self.top5, first=5),
            self._measure("mean per class", self.mean_per_class),
        ]


@dataclass(frozen=True)
class RecallAtK:
    """Fraction of queries with a correct candidate among the first 1, 5 and 10, and the same for a random order."""

    queries: int
    candidates: int
    r1: float
    r5: float
    r10: float
    chance1: float
    chance5: float
    chance10: float
    median_rank: float  # of the best correct candidate; 1 is perfect


@dataclass(frozen=True)
class RetrievalResult(Result):
    """Image-text retrieval in both directions."""

    task: ClassVar[str] = "retrieval"
    images: int
    texts: int
    text_to_image: RecallAtK  # each caption is the query for its image
    image_to_text: RecallAtK  # each image is the query for any of its captions
    truncated_captions: int = 0  # captions longer than the context, which were cut
    loss: float | None = None  # `declip.evaluation.retrieval.contrastive_loss`; None: unknown scale

    def measures(self) -> list[Measure]:
        measures = []
        for direction, words in DIRECTIONS.items():
            recall = getattr(self, direction)
            for k in (1, 5, 10):
                value = getattr(recall, f"r{k}")
                chance = getattr(recall, f"chance{k}")
                measures.append(Measure(f"{words} R@{k}", value, chance, recall.queries))
        return measures

    @property
    def headline(self) -> Measure:
        """The mean of both directions."""
        first = self.text_to_image
        second = self.image_to_text
        value = (first.r1 + second.r1) / 2
        chance = (first.chance1 + second.chance1) / 2
        return Measure("R@1", value, chance, self.images)

    @property
    def among(self) -> str:
        return f"{self.images:,} images and {self.texts:,} captions"

    def to_dict(self) -> dict[str, Any]:
        """Convert to a flat, JSON-ready row, with ``text_to_image_r1`` and so on."""
        row = super().to_dict()
        for direction in DIRECTIONS:
            row |= {f"{direction}_{name}": value for name, value in row.pop(direction).items()}
        return row


@dataclass(frozen=True, kw_only=True)
class LinearProbeResult(ClassificationResult):
    """Logistic regression on frozen features, before the projection."""

    task: ClassVar[str] = "linear"
    train: int  # number of training and validation images
    width: int
    top1: float
    mean_per_class: float
    majority: float  # test fraction of the most frequent training class: top-1 of a probe on random features
    C: float  # the selected inverse strength of the L2 penalty, as in scikit-learn
    validation: str  # the images that selected C: "validation split" or "fifth of train"
    converged: bool

    def measures(self) -> list[Measure]:
        return [
            Measure("linear probe, top-1", self.top1, self.majority or self.chance, self.n),
            self._measure("linear probe, mean per class", self.mean_per_class),
        ]


@dataclass(frozen=True, kw_only=True)
class FewShotResult(ClassificationResult):
    """Classification by class names and a few images of each class, means over random draws of these images."""

    task: ClassVar[str] = "few-shot"
    shots: int  # images of a class
    draws: int
    top1: float
    mean_per_class: float
    deviation: float  # standard deviation of top-1 over the draws
    names_top1: float  # by the names alone

    def measures(self) -> list[Measure]:
        shots = f"{self.shots} shot" + ("s" if self.shots > 1 else "")
        return [
            self._measure(f"{shots}, top-1", self.top1),
            self._measure(f"{shots}, mean per class", self.mean_per_class),
            self._measure("names alone, top-1", self.names_top1),
        ]


KINDS = (ZeroShotResult, RetrievalResult, LinearProbeResult, FewShotResult)
READERS: Mapping[str, TypeAdapter[Any]] = {kind.task: TypeAdapter(kind) for kind in KINDS}


def read_result(row: Mapping[str, Any]) -> Result | None:
    """Parse a row of `to_dict`, ignoring other keys such as "step"; None for an unknown task."""
    if row.get("task") not in READERS:
        return None
    # The numbers of both directions of retrieval are columns of the row.
    recalls = {}
    if row["task"] == RetrievalResult.task:
        columns = [column.name for column in fields(RecallAtK)]
        for direction in DIRECTIONS:
            recalls[direction] = {name: row[f"{direction}_{name}"] for name in columns}
    return READERS[row["task"]].validate_python({**row, **recalls})


def short_names(datasets: Iterable[str]) -> dict[str, str]:
    """Shorten dataset names for a table: "pets:photos" for "pets:/data/photos", unless two would be equal."""
    # A letter before a colon is a Windows drive.
    short = {
        name: re.sub(r"^([^:/\\]{2,}:)?.*[/\\](?=.)", r"\1", name.rstrip("/\\"))
        for name in datasets
    }
    count = Counter(short.values())
    return {name: last if count[last] == 1 else name for name, last in short.items()}


def by_class(labels: np.ndarray) -> list[np.ndarray]:
    """Group rows by class, for the classes that occur; classes and rows ascending."""
    order = np.argsort(labels, kind="stable")
    changes = np.flatnonzero(np.diff(labels[order]))
    return np.split(order, changes + 1)


def sample_per_class(labels: np.ndarray, count: Callable[[int], int], seed: int = 0) -> np.ndarray:
    """Sample `count(size)` rows of each class: (n,) bool. With one seed, a larger sample includes a smaller one."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), dtype=bool)
    for rows in by_class(labels):
        shuffled = generator.permutation(rows)
        chosen[shuffled[: count(len(rows))]] = True
    return chosen


def score(correct: np.ndarray, labels: np.ndarray, metric: str = "top1") -> float:
    """Mean of `correct`, (n,) bool: over rows for "top1", over the classes that occur for "mean_per_class"."""
    if metric == "top1":
        return float(correct.mean())
    means = [correct[rows].mean() for rows in by_class(labels)]
    return float(np.mean(means))
