"""Results of evaluations: numbers with their n and their chance, as rows of JSON and as a table."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from math import sqrt
from typing import Any, ClassVar, NamedTuple, Self

from rich.markup import escape
from rich.table import Table

from declip.io.text import percent, times

METRICS: Mapping[str, str] = {"top1": "top-1", "mean_per_class": "mean per class"}
"""Metrics that a dataset's convention may report → their names in tables."""

UNBALANCED = 1.1
"""The majority fraction is shown where it is this many times chance."""


class Measure(NamedTuple):
    """One number, its chance level, and the number of queries that it is the mean of.

    Results of different models are matched by `name`. Details that differ from model to model, such as a spread,
    belong to `detail`, which is shown after the name.
    """

    name: str
    value: float
    chance: float
    n: int
    detail: str = ""
    majority: float | None = None

    @property
    def label(self) -> str:
        """Name and detail."""
        return f"{self.name} {self.detail}".strip()

    @property
    def times_chance(self) -> float:
        """The value over chance."""
        return self.value / self.chance

    @property
    def margin(self) -> float:
        """Half the width of the 95 % interval of a fraction of `n` independent trials (Wilson 1927)."""
        z, n, p = 1.96, self.n, self.value
        return z / (1 + z * z / n) * sqrt(p * (1 - p) / n + z * z / (4 * n * n))


@dataclass(frozen=True)
class Result:
    """Base class of the results.

    Attributes:
        rows: Classes of the fields that are tuples of records.
        skipped: Number of images left out because they could not be read, by reason.
    """

    task: ClassVar[str]
    rows: ClassVar[Mapping[str, type]] = {}
    dataset: str
    skipped: Mapping[str, int] = field(default_factory=dict, kw_only=True)

    def measures(self) -> list[Measure]:
        """The numbers that a table shows."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready row; `read_result` reads it back."""
        return {"task": self.task, **asdict(self)}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Read a row that `to_dict` wrote; further keys are ignored, and missing ones take their defaults."""
        values = {each.name: row[each.name] for each in fields(cls) if each.name in row}
        for name, kind in cls.rows.items():
            values[name] = tuple(kind(**{key: _tuples(value) for key, value in each.items()}) for each in row[name])
        return cls(**values)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class ClassificationResult(Result):
    """Base class of results on `n` test images with `classes` to choose from."""

    n: int
    classes: int

    @property
    def chance(self) -> float:
        """Chance level of top-1: 1 / classes."""
        return 1 / self.classes

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-ready row, with chance."""
        return {**super().to_dict(), "chance": self.chance}


@dataclass(frozen=True)
class ZeroShotResult(ClassificationResult):
    """Zero-shot classification.

    Attributes:
        mean_per_class: Mean of the classes' own top-1; classes without an image do not count.
        templates: Name of the prompt templates, or the templates themselves.
        majority: Fraction of images of the most frequent class: top-1 of a model that always says that class.
    """

    task: ClassVar[str] = "zero-shot"
    top1: float
    top5: float
    mean_per_class: float
    templates: str = "plain"
    majority: float | None = None

    @property
    def times_chance(self) -> float:
        """Top-1 over chance."""
        return self.top1 / self.chance

    def measures(self) -> list[Measure]:
        unbalanced = self.majority is not None and self.majority >= UNBALANCED * self.chance
        return [
            Measure("top-1", self.top1, self.chance, self.n, majority=self.majority if unbalanced else None),
            Measure("top-5", self.top5, min(5, self.classes) / self.classes, self.n),
            Measure("mean per class", self.mean_per_class, self.chance, self.n),
        ]


@dataclass(frozen=True)
class RecallAtK:
    """One direction of retrieval.

    Attributes:
        r1, r5, r10: Fraction of queries with a right candidate among the first 1, 5, 10.
        chance1, chance5, chance10: The same for a random order.
        median_rank: Median over the queries of the best right candidate's rank; 1 is perfect.
    """

    queries: int
    candidates: int
    r1: float
    r5: float
    r10: float
    chance1: float
    chance5: float
    chance10: float
    median_rank: float

    def measures(self, direction: str) -> list[Measure]:
        """R@1, R@5 and R@10 with `direction` before their names."""
        return [
            Measure(f"{direction} R@{k}", getattr(self, f"r{k}"), getattr(self, f"chance{k}"), self.queries)
            for k in (1, 5, 10)
        ]


DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class RetrievalResult(Result):
    """Image-text retrieval in both directions.

    Attributes:
        text_to_image: Each caption is the query for its image.
        image_to_text: Each image is the query for any of its captions.
        duplicate_images: Number of images with the same features as another one.
        duplicate_captions: Number of captions that another image carries too, word for word.
        truncated_captions: Number of captions longer than the model's context; their ends were not read.
        same_caption: "wrong": a duplicate caption counts for its own image only; "right": for all of them.
    """

    task: ClassVar[str] = "retrieval"
    images: int
    texts: int
    text_to_image: RecallAtK
    image_to_text: RecallAtK
    duplicate_images: int = 0
    duplicate_captions: int = 0
    truncated_captions: int = 0
    same_caption: str = "wrong"

    def measures(self) -> list[Measure]:
        return self.text_to_image.measures("text → image") + self.image_to_text.measures("image → text")

    def to_dict(self) -> dict[str, Any]:
        """Convert to a flat, JSON-ready row, with ``text_to_image_r1`` and so on."""
        row = super().to_dict()
        for direction in DIRECTIONS:
            row |= {f"{direction}_{name}": value for name, value in row.pop(direction).items()}
        return row

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Read a row that `to_dict` wrote."""
        recalls = {
            direction: RecallAtK(**{each.name: row[f"{direction}_{each.name}"] for each in fields(RecallAtK)})
            for direction in DIRECTIONS
        }
        return super().from_dict({**row, **recalls})


@dataclass(frozen=True, kw_only=True)
class ProbeResult(ClassificationResult):
    """Base class of the probes' results.

    Attributes:
        train: Number of images to learn from, including those that choices are made on.
        features: "backbone", before the projection, or "embedding", after it, with their `width`.
        metric: Metric of the dataset's convention: "top1" or "mean_per_class".
    """

    train: int
    features: str
    width: int
    metric: str = "top1"


@dataclass(frozen=True)
class SweepPoint:
    """One value of C that was tried: metric (`score`) and cross entropy (`loss`) on the validation images."""

    C: float
    score: float
    loss: float
    iterations: int
    converged: bool


@dataclass(frozen=True, kw_only=True)
class LinearProbeResult(ProbeResult):
    """Logistic regression on frozen features.

    Attributes:
        C: The chosen inverse strength of the L2 penalty, scikit-learn's.
        validation: Images that C was chosen on: "validation split" or "fifth of train".
        sweep: Every C that was tried, ascending.
        iterations, converged: Of the last fit by L-BFGS.
    """

    task: ClassVar[str] = "linear"
    rows: ClassVar[Mapping[str, type]] = {"sweep": SweepPoint}
    top1: float
    mean_per_class: float
    C: float
    validation: str
    sweep: tuple[SweepPoint, ...]
    iterations: int
    converged: bool

    def measures(self) -> list[Measure]:
        return [
            Measure(f"linear probe, {name}", getattr(self, metric), self.chance, self.n)
            for metric, name in METRICS.items()
        ]


@dataclass(frozen=True)
class Votes:
    """The vote of the `k` nearest neighbors; a class that ties with another does not come first."""

    k: int
    top1: float
    top5: float
    mean_per_class: float


@dataclass(frozen=True, kw_only=True)
class KNNResult(ProbeResult):
    """Votes of the nearest training images, weighted by exp(cosine / temperature), for each k."""

    task: ClassVar[str] = "knn"
    rows: ClassVar[Mapping[str, type]] = {"votes": Votes}
    temperature: float
    votes: tuple[Votes, ...]

    def measures(self) -> list[Measure]:
        """The numbers of every k; none is chosen."""
        five = min(5, self.classes) / self.classes
        measures = []
        for vote in self.votes:
            top = getattr(vote, self.metric)
            measures.append(Measure(f"{vote.k}-NN, {METRICS[self.metric]}", top, self.chance, self.n))
            measures.append(Measure(f"{vote.k}-NN, top-5", vote.top5, five, self.n))
        return measures


@dataclass(frozen=True)
class Shots:
    """Fits on `shots` images per class.

    Attributes:
        std: Standard deviation over the seeds, with n - 1 below; 0 for one seed.
        scores: The dataset's metric on the test images for each seed.
        C: The value that each seed's few validation images chose.
        images: Number of training images of each fit.
        short: Number of classes with fewer images than `shots`; all of theirs were used.
    """

    shots: int
    mean: float
    std: float
    scores: tuple[float, ...]
    C: tuple[float, ...]
    images: int
    short: int


@dataclass(frozen=True, kw_only=True)
class FewShotResult(ProbeResult):
    """Logistic regression on a few images per class, for each number of shots."""

    task: ClassVar[str] = "few-shot"
    rows: ClassVar[Mapping[str, type]] = {"runs": Shots}
    validation: str
    runs: tuple[Shots, ...]

    def measures(self) -> list[Measure]:
        """The means, with the standard deviation over the seeds in points."""
        name = METRICS[self.metric]
        details = [f"± {100 * run.std:.1f} ({len(run.scores)} seeds)" for run in self.runs]
        return [
            Measure(f"{run.shots}-shot, {name}", run.mean, self.chance, self.n, detail)
            for run, detail in zip(self.runs, details, strict=True)
        ]


RESULTS: Mapping[str, type[Result]] = {
    kind.task: kind for kind in (ZeroShotResult, RetrievalResult, LinearProbeResult, KNNResult, FewShotResult)
}


def read_result(row: Mapping[str, Any]) -> Result | None:
    """Read a row that `to_dict` wrote; further keys, such as "step", are ignored. None for an unknown task."""
    kind = RESULTS.get(row.get("task", ""))
    return None if kind is None else kind.from_dict(row)


def results_table(results: Sequence[Result], title: str | None = None) -> Table:
    """Show every number with its chance, its multiple of chance and its n, for a terminal.

    Where a class is much more frequent than others, its fraction (majority) stands next to chance.
    """
    majority = any(measure.majority is not None for result in results for measure in result.measures())
    table = Table(title=title)
    table.add_column("measure")
    for name in ("value", "chance", *(["majority"] if majority else []), "× chance", "n"):
        table.add_column(name, justify="right")

    def add(label: str, n: int, value: str = "", chance: str = "", most: str = "", factor: str = "") -> None:
        table.add_row(label, value, chance, *([most] if majority else []), factor, f"{n:,}")

    names = short_names(result.dataset for result in results)
    for result in results:
        table.add_row(f"[bold]{escape(names[result.dataset])}[/]")
        for measure in result.measures():
            most = "" if measure.majority is None else percent(measure.majority)
            value, chance, factor = percent(measure.value), percent(measure.chance), times(measure.times_chance)
            add(f"  {measure.label}", measure.n, value, chance, most, factor)
        if isinstance(result, RetrievalResult) and result.duplicate_images:
            add("  images with another one's features", result.duplicate_images)
        if result.skipped:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in result.skipped.items())
            add("  left out, unreadable", sum(result.skipped.values()), reasons)
        table.add_section()
    return table


def short_names(datasets: Iterable[str]) -> dict[str, str]:
    """Shorten names of datasets for a table: of each path as few of its last parts as distinguish it from the others.

    "coco/test.jsonl" and "flickr/test.jsonl" for "/data/coco/test.jsonl" and "/data/flickr/test.jsonl".
    """
    paths = {name: name.replace("\\", "/").rstrip("/") for name in datasets}
    short = {}
    for name, path in paths.items():
        others = [f"/{other}" for given, other in paths.items() if given != name]
        kind = path[: path.find(":", 2) + 1]  # "coco:"; a letter before a colon is a Windows drive
        parts = path.removeprefix(kind).split("/")
        tails = ("/".join(parts[-count:]) for count in range(1, len(parts)))
        unique = (kind + tail for tail in tails if not any(other.endswith(f"/{tail}") for other in others))
        short[name] = next(unique, name)
    return short
