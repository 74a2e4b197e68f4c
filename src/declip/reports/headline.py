"""The numbers at the top of a report, each with a plain explanation, and the table of all measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

from declip.evaluation.results import Recall, RetrievalResult, ZeroShotResult
from declip.io.text import duration, percent, times
from declip.runs.records import Evaluated, Run

COMPARED = ("top-1", "text → image R@1", "image → text R@1")
"""The measures whose change is told."""

SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Figure:
    """A large number with its name and what it means."""

    value: str
    name: str
    meaning: str


@dataclass(frozen=True)
class Row:
    """A line of a table of measurements.

    Attributes:
        on: The source.
        kind: What was asked: "name", "text → image" or "image → text".
        values: Three shares; their names depend on the table.
        chance: Of the first.
        times: The first over its chance.
        n: Queries.
        step: After which it was measured.
    """

    on: str
    kind: str
    values: tuple[str, str, str]
    chance: str
    times: str
    n: str
    step: str


@dataclass(frozen=True)
class Change:
    """What became of a number between the start of fine-tuning and the last measurement.

    Attributes:
        on: The source.
        kind: What was measured.
        before, after: Shares, before the first step and at the last.
        points: The change in percentage points, with its sign.
        better: Whether it rose.
        n: Queries.
    """

    on: str
    kind: str
    before: str
    after: str
    points: str
    better: bool
    n: str


def changes(run: Run) -> list[Change]:
    """What fine-tuning won and what it forgot: of every set that was measured before the first step and later."""
    before = {(row.result.on, row.result.protocol): row for row in run.evaluations if row.step == 0}
    found = []
    for row in run.last():
        start = before.get((row.result.on, row.result.protocol))
        if start is None or row.step == 0:
            continue
        for old, new in zip(start.result.measures(), row.result.measures(), strict=True):
            if old.name in COMPARED:
                moved = 100 * (new.value - old.value)
                found.append(
                    Change(
                        row.result.on,
                        new.name,
                        share(old.value),
                        share(new.value),
                        f"{moved:+.1f}".replace("-", "−"),
                        moved >= 0,
                        f"{new.n:,}",
                    )
                )
    return found


def primary(run: Run, preferred: str | None) -> str | None:
    """The source that the headline is about: the preferred one if it was measured, else the last one measured."""
    names = [row.result.on for row in run.evaluations]
    return preferred if preferred in names else names[-1] if names else None


def lead(run: Run, on: str | None) -> str:
    """One sentence that says how good the model is."""
    zero_shot = _last_zero_shot(run, on)
    if zero_shot is None:
        return f"{run.samples_seen:,} pairs seen in {run.step:,} steps; nothing has been classified yet."
    return (
        f"After {run.samples_seen:,} pairs seen, this model gives the right name to {share(zero_shot.top1)} of "
        f"{zero_shot.n:,} held-out images, choosing among {zero_shot.classes:,} names at its first guess. "
        f"Guessing would get {share(zero_shot.chance)}: {times(zero_shot.times_chance)} times less."
    )


def figures(run: Run, on: str | None) -> list[Figure]:
    """The large numbers; those that were not measured are left out."""
    found: list[Figure] = []
    if (zero_shot := _last_zero_shot(run, on)) is not None:
        found += _of_zero_shot(zero_shot)
    if (retrieval := _last_retrieval(run, on)) is not None:
        found += _of_retrieval(retrieval)
    if run.metrics:
        found.append(
            Figure(
                f"{run.samples_seen:,}",
                "pairs seen",
                f"In {run.step:,} steps; a pair counts again each time it comes.",
            )
        )
    if (rate := run.samples_per_second) is not None:
        took = f"; {duration(run.seconds)} of training in all" if run.seconds else ""
        found.append(Figure(f"{rate:,.0f}", "pairs a second", f"Median over the logged steps{took}."))
    return found


def naming_rows(evaluated: Sequence[Evaluated]) -> list[Row]:
    """Zero-shot classification: top-1, top-5, mean per class."""
    return [
        Row(
            on=each.result.on,
            kind="name",
            values=(share(each.result.top1), share(each.result.top5), share(each.result.mean_per_class)),
            chance=share(each.result.chance),
            times=times(each.result.times_chance),
            n=f"{each.result.n:,}",
            step=f"{each.step:,}",
        )
        for each in evaluated
        if isinstance(each.result, ZeroShotResult)
    ]


def retrieval_rows(evaluated: Sequence[Evaluated]) -> list[Row]:
    """Retrieval in both directions: R@1, R@5, R@10."""

    def row(each: Evaluated, kind: str, recall: Recall) -> Row:
        return Row(
            on=each.result.on,
            kind=kind,
            values=(share(recall.r1), share(recall.r5), share(recall.r10)),
            chance=share(recall.chance1),
            times=times(recall.r1 / recall.chance1),
            n=f"{recall.queries:,}",
            step=f"{each.step:,}",
        )

    return [
        row(each, kind, recall)
        for each in evaluated
        if isinstance(each.result, RetrievalResult)
        for kind, recall in (
            ("text → image", each.result.text_to_image),
            ("image → text", each.result.image_to_text),
        )
    ]


def share(value: float) -> str:
    """A share in percent that is not broken at a line's end."""
    return percent(value).replace(" ", SPACE)


def _multiple(factor: float) -> str:
    return f"{times(factor)} × chance".replace(" ", SPACE)


def _of_zero_shot(result: ZeroShotResult) -> list[Figure]:
    first, fifth, _ = result.measures()
    return [
        Figure(
            share(first.value),
            "top-1",
            f"Images whose right name comes first, of {result.n:,} (±{SPACE}{100 * first.margin:.1f}{SPACE}points). "
            f"{_multiple(first.times_chance)}.",
        ),
        Figure(
            share(fifth.value),
            "top-5",
            f"Right name among the first five. {_multiple(fifth.times_chance)} ({share(fifth.chance)}).",
        ),
        Figure(
            share(result.chance),
            "chance",
            f"Top-1 of blind guessing: one name in {result.classes:,}.",
        ),
    ]


def _of_retrieval(result: RetrievalResult) -> list[Figure]:
    text, image = result.text_to_image, result.image_to_text
    return [
        Figure(
            share(text.r1),
            "R@1, text → image",
            f"Captions that find their image first among {text.candidates:,}. "
            f"{_multiple(text.r1 / text.chance1)} ({share(text.chance1)}).",
        ),
        Figure(
            share(image.r1),
            "R@1, image → text",
            f"Images that find a caption of theirs first among {image.candidates:,}. "
            f"{_multiple(image.r1 / image.chance1)} ({share(image.chance1)}).",
        ),
    ]


def _last_zero_shot(run: Run, on: str | None) -> ZeroShotResult | None:
    found = [row.result for row in run.evaluations if row.result.on == on]
    return next((result for result in reversed(found) if isinstance(result, ZeroShotResult)), None)


def _last_retrieval(run: Run, on: str | None) -> RetrievalResult | None:
    found = [row.result for row in run.evaluations if row.result.on == on]
    return next((result for result in reversed(found) if isinstance(result, RetrievalResult)), None)
