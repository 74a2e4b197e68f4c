"""What an evaluation returns: numbers with their n and their chance, as a record and as a table."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from rich.markup import escape
from rich.table import Table

from declip.evaluation.measure import Measure
from declip.evaluation.probes.results import FewShotResult, KNNResult, LinearProbeResult
from declip.io.text import percent, times


@dataclass(frozen=True)
class ZeroShotResult:
    """Zero-shot classification.

    Attributes:
        on: Name of the source.
        n: Images measured.
        classes: How many classes there were to choose from.
        top1: Share of images whose class comes first.
        top5: Share of images whose class is among the first five.
        mean_per_class: Mean of the classes' own top-1; classes without an image do not count.
        templates: Name of the prompt templates, or the templates themselves.
        skipped: Images left out because they could not be read: reason to count.
    """

    protocol: ClassVar[str] = "zero-shot"
    on: str
    n: int
    classes: int
    top1: float
    top5: float
    mean_per_class: float
    templates: str = "plain"
    skipped: Mapping[str, int] = field(default_factory=dict)

    @property
    def chance(self) -> float:
        """Top-1 of guessing: 1 / classes."""
        return 1 / self.classes

    @property
    def times_chance(self) -> float:
        """Top-1 over chance."""
        return self.top1 / self.chance

    def measures(self) -> list[Measure]:
        """The numbers that a table shows."""
        return [
            Measure("top-1", self.top1, self.chance, self.n),
            Measure("top-5", self.top5, min(5, self.classes) / self.classes, self.n),
            Measure("mean per class", self.mean_per_class, self.chance, self.n),
        ]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready row; `read_result` reads it back."""
        return {
            "protocol": self.protocol,
            "on": self.on,
            "n": self.n,
            "classes": self.classes,
            "top1": self.top1,
            "top5": self.top5,
            "mean_per_class": self.mean_per_class,
            "chance": self.chance,
            "times_chance": self.times_chance,
            "templates": self.templates,
            "skipped": dict(self.skipped),
        }


@dataclass(frozen=True)
class Recall:
    """One direction of retrieval.

    Attributes:
        queries: How many queries were asked.
        candidates: Among how many candidates each had to find its own.
        r1, r5, r10: Share of queries with a right candidate among the first 1, 5, 10.
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

    FIELDS: ClassVar[tuple[str, ...]] = (
        "queries", "candidates", "r1", "r5", "r10", "chance1", "chance5", "chance10", "median_rank",
    )  # fmt: skip

    def measures(self, direction: str) -> list[Measure]:
        """R@1, R@5 and R@10 with `direction` before their names."""
        return [
            Measure(f"{direction} R@{k}", getattr(self, f"r{k}"), getattr(self, f"chance{k}"), self.queries)
            for k in (1, 5, 10)
        ]


@dataclass(frozen=True)
class RetrievalResult:
    """Image-text retrieval in both directions.

    Attributes:
        on: Name of the source.
        images: Images measured.
        texts: Captions measured, all captions of all images.
        text_to_image: Each caption looks for its image.
        image_to_text: Each image looks for one of its captions.
        duplicate_images: How many of the images have the same features as another one.
        duplicate_captions: How many of the captions another image carries too, word for word.
        same_caption: "wrong": such a caption counts for its own image only; "right": for all of them.
        skipped: Pairs left out because they could not be read: reason to count.
    """

    protocol: ClassVar[str] = "retrieval"
    on: str
    images: int
    texts: int
    text_to_image: Recall
    image_to_text: Recall
    duplicate_images: int = 0
    duplicate_captions: int = 0
    same_caption: str = "wrong"
    skipped: Mapping[str, int] = field(default_factory=dict)

    def measures(self) -> list[Measure]:
        """The numbers that a table shows."""
        return self.text_to_image.measures("text → image") + self.image_to_text.measures("image → text")

    def to_dict(self) -> dict[str, Any]:
        """A flat, JSON-ready row (``text_to_image_r1`` …); `read_result` reads it back."""
        row: dict[str, Any] = {"protocol": self.protocol, "on": self.on, "images": self.images, "texts": self.texts}
        for direction in ("text_to_image", "image_to_text"):
            recall = getattr(self, direction)
            row |= {f"{direction}_{name}": getattr(recall, name) for name in Recall.FIELDS}
        return row | {
            "duplicate_images": self.duplicate_images,
            "duplicate_captions": self.duplicate_captions,
            "same_caption": self.same_caption,
            "skipped": dict(self.skipped),
        }


Result = ZeroShotResult | RetrievalResult | LinearProbeResult | KNNResult | FewShotResult


def _given(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _read_zero_shot(row: Mapping[str, Any]) -> ZeroShotResult:
    names = ("on", "n", "classes", "top1", "top5", "mean_per_class", "templates", "skipped")
    return ZeroShotResult(**_given(row, *names))


def _read_retrieval(row: Mapping[str, Any]) -> RetrievalResult:
    return RetrievalResult(
        text_to_image=_read_recall(row, "text_to_image"),
        image_to_text=_read_recall(row, "image_to_text"),
        duplicate_images=row.get("duplicate_images", 0),
        **_given(row, "on", "images", "texts", "duplicate_captions", "same_caption", "skipped"),
    )


def _read_recall(row: Mapping[str, Any], direction: str) -> Recall:
    return Recall(**{name: row[f"{direction}_{name}"] for name in Recall.FIELDS})


READERS: Mapping[str, Callable[[Mapping[str, Any]], Result]] = {
    ZeroShotResult.protocol: _read_zero_shot,
    RetrievalResult.protocol: _read_retrieval,
    LinearProbeResult.protocol: LinearProbeResult.from_dict,
    KNNResult.protocol: KNNResult.from_dict,
    FewShotResult.protocol: FewShotResult.from_dict,
}
"""What reads the rows of each protocol."""


def read_result(row: Mapping[str, Any]) -> Result | None:
    """Read a row that `to_dict` wrote; further keys, such as "step", are ignored.

    Returns:
        The result, or None for a protocol that has no typed result here.
    """
    reader = READERS.get(row.get("protocol", ""))
    return None if reader is None else reader(row)


def results_table(results: Sequence[Result], title: str | None = None) -> Table:
    """Every number beside its chance, its multiple of chance and its n, for a terminal."""
    table = Table(title=title)
    table.add_column("measure")
    for name in ("value", "chance", "× chance", "n"):
        table.add_column(name, justify="right")
    names = short_names(result.on for result in results)
    for result in results:
        table.add_row(f"[bold]{escape(names[result.on])}[/]")
        for measure in result.measures():
            table.add_row(
                f"  {measure.label}",
                percent(measure.value),
                percent(measure.chance),
                times(measure.times_chance),
                f"{measure.n:,}",
            )
        if isinstance(result, RetrievalResult) and result.duplicate_images:
            table.add_row("  images like another, feature by feature", "", "", "", f"{result.duplicate_images:,}")
        if result.skipped:
            left_out = ", ".join(f"{count:,} {reason}" for reason, count in result.skipped.items())
            table.add_row("  left out, unreadable", left_out, "", "", f"{sum(result.skipped.values()):,}")
        table.add_section()
    return table


def short_names(sets: Iterable[str]) -> dict[str, str]:
    """Names of sets for a table: of each path as few of its last parts as tell it from the others.

    "coco/test.jsonl" and "flickr/test.jsonl" for "/data/coco/test.jsonl" and "/data/flickr/test.jsonl".

    Args:
        sets: As the user wrote them.
    """
    paths = {name: name.replace("\\", "/").rstrip("/") for name in sets}
    short = {}
    for name, path in paths.items():
        others = [f"/{other}" for each, other in paths.items() if each != name]
        kind = path[: path.find(":", 2) + 1]  # "coco:"; a letter before a colon is a Windows drive
        parts = path.removeprefix(kind).split("/")
        tails = ("/".join(parts[-count:]) for count in range(1, len(parts)))
        found = (kind + tail for tail in tails if not any(other.endswith(f"/{tail}") for other in others))
        short[name] = next(found, name)
    return short
