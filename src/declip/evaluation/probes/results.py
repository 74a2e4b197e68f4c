"""What the probes return: linear, nearest neighbors, few images a class."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Self

from declip.evaluation.measure import Measure

METRICS: Mapping[str, str] = {"top1": "top-1", "mean_per_class": "mean per class"}
"""What a set's convention may report, and how a table names it."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What all probes have in common.

    Attributes:
        on: Name of the set.
        n: Test images measured.
        classes: How many classes there were to choose from.
        train: Images that the probe could learn from, those for choosing it included.
        features: "backbone", before the projection, or "embedding", after it.
        width: Numbers in a feature.
        metric: The number that the set's convention reports: "top1" or "mean_per_class".
        skipped: Images left out because they could not be read, in all splits: reason to count.
    """

    protocol: ClassVar[str]
    on: str
    n: int
    classes: int
    train: int
    features: str
    width: int
    metric: str = "top1"
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def chance(self) -> float:
        """Of guessing: 1 / classes."""
        return 1 / self.classes

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready row; `from_dict` reads it back."""
        return {"protocol": self.protocol, **asdict(self), "chance": self.chance}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Read a row that `to_dict` wrote; further keys are ignored."""
        return cls(**{each.name: row[each.name] for each in fields(cls)})


@dataclass(frozen=True)
class SweepPoint:
    """One value of C that was tried.

    Attributes:
        C: Inverse strength of the L2 penalty, scikit-learn's.
        score: On the validation images, by the set's metric.
        loss: Cross entropy on the validation images; it decides between equal scores.
        iterations: Of L-BFGS.
        converged: Whether the fit reached its tolerance.
    """

    C: float
    score: float
    loss: float
    iterations: int
    converged: bool


@dataclass(frozen=True, kw_only=True)
class LinearProbeResult(ProbeResult):
    """Logistic regression on frozen features.

    Attributes:
        top1: Share of the test images whose class the probe predicts.
        mean_per_class: Mean of the classes' own top-1; classes without a test image do not count.
        C: The penalty's inverse strength that was chosen.
        validation: What C was chosen on: "validation split" or "fifth of train".
        sweep: Every C that was tried, ascending.
        iterations: Of the last fit.
        converged: Whether it reached its tolerance.
    """

    protocol: ClassVar[str] = "linear"
    top1: float
    mean_per_class: float
    C: float
    validation: str
    sweep: tuple[SweepPoint, ...]
    iterations: int
    converged: bool

    def measures(self) -> list[Measure]:
        """The numbers that a table shows."""
        return [
            Measure(f"linear probe, {name}", getattr(self, metric), self.chance, self.n)
            for metric, name in METRICS.items()
        ]

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Read a row that `to_dict` wrote; further keys are ignored."""
        return super().from_dict({**row, "sweep": tuple(SweepPoint(**point) for point in row["sweep"])})


@dataclass(frozen=True)
class Votes:
    """A vote of the k nearest.

    Attributes:
        k: How many vote.
        top1: Share of the test images whose class gets more weight than any other.
        top5: Share of the test images whose class is among the first five.
        mean_per_class: Mean of the classes' own top-1.
    """

    k: int
    top1: float
    top5: float
    mean_per_class: float


@dataclass(frozen=True, kw_only=True)
class KNNResult(ProbeResult):
    """A vote of the nearest training images.

    Attributes:
        temperature: A neighbor of cosine s has the weight exp(s / temperature).
        votes: One for each k, ascending.
    """

    protocol: ClassVar[str] = "knn"
    temperature: float
    votes: tuple[Votes, ...]

    def measures(self) -> list[Measure]:
        """The numbers that a table shows: every k's, none chosen."""
        five = min(5, self.classes) / self.classes
        return [
            measure
            for vote in self.votes
            for measure in (
                Measure(f"{vote.k}-NN, {METRICS[self.metric]}", getattr(vote, self.metric), self.chance, self.n),
                Measure(f"{vote.k}-NN, top-5", vote.top5, five, self.n),
            )
        ]

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Read a row that `to_dict` wrote; further keys are ignored."""
        return super().from_dict({**row, "votes": tuple(Votes(**vote) for vote in row["votes"])})


@dataclass(frozen=True)
class Shots:
    """Fits on a number of images a class.

    Attributes:
        shots: Images a class.
        mean: Of the seeds' scores on the test images, by the set's metric.
        std: Their standard deviation, with n - 1 below; 0 for one seed.
        scores: One for each seed.
        C: The value that each seed's few validation images chose.
        images: How many images each fit had.
        short: Classes that had fewer images than `shots`; all that they had were used.
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
    """Logistic regression on a few images a class.

    Attributes:
        validation: What C was chosen on.
        runs: One for each number of shots, ascending.
    """

    protocol: ClassVar[str] = "few-shot"
    validation: str
    runs: tuple[Shots, ...]

    def measures(self) -> list[Measure]:
        """The numbers that a table shows: means with the seeds' standard deviation in points."""
        return [
            Measure(
                f"{run.shots}-shot, {METRICS[self.metric]}",
                run.mean,
                self.chance,
                self.n,
                f"± {100 * run.std:.1f} ({len(run.scores)} seeds)",
            )
            for run in self.runs
        ]

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Self:
        """Read a row that `to_dict` wrote; further keys are ignored."""
        runs = (Shots(**{**run, "scores": tuple(run["scores"]), "C": tuple(run["C"])}) for run in row["runs"])
        return super().from_dict({**row, "runs": tuple(runs)})
