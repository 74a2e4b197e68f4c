"""The numbers at the top of a report, each with a plain explanation, and the table of all measurements."""

from collections.abc import Sequence
from dataclasses import dataclass

from declip.evaluation.report_run import Evaluated, Run
from declip.evaluation.results import RetrievalResult, ZeroShotResult, percent, times


@dataclass(frozen=True)
class Figure:
    """A large number with its name and what it means."""

    value: str
    name: str
    meaning: str


@dataclass(frozen=True)
class Row:
    """A line of the table of measurements."""

    on: str
    measure: str
    value: str
    chance: str
    times: str
    n: str
    step: str


def primary(run: Run, preferred: str | None) -> str | None:
    """The source that the headline is about: the preferred one if it was measured, else the last one measured."""
    names = [row.result.on for row in run.evaluations]
    return preferred if preferred in names else names[-1] if names else None


def lead(run: Run, on: str | None) -> str:
    """One sentence that says how good the model is."""
    zero_shot = _last_zero_shot(run, on)
    if zero_shot is None:
        return f"{run.pairs_seen:,} pairs seen in {run.step:,} steps; nothing has been classified yet."
    return (
        f"After {run.pairs_seen:,} pairs seen, this model gives the right name to {percent(zero_shot.top1)} of "
        f"{zero_shot.n:,} held-out images, choosing among {zero_shot.classes:,} names at its first guess. "
        f"Guessing would get {percent(zero_shot.chance)}: {times(zero_shot.times_chance)} times less."
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
                f"{run.pairs_seen:,}",
                "pairs seen",
                f"In {run.step:,} steps; a pair counts again each time it comes.",
            )
        )
    if (rate := run.pairs_per_second) is not None:
        took = f"; {duration(run.seconds)} of training in all" if run.seconds else ""
        found.append(Figure(f"{rate:,.0f}", "pairs a second", f"Median over the logged steps{took}."))
    return found


def rows(evaluated: Sequence[Evaluated]) -> list[Row]:
    """Every measure of every result, with its chance."""
    return [
        Row(
            on=each.result.on,
            measure=measure.name,
            value=percent(measure.value),
            chance=percent(measure.chance),
            times=times(measure.times_chance),
            n=f"{measure.n:,}",
            step=f"{each.step:,}",
        )
        for each in evaluated
        for measure in each.result.measures()
    ]


def duration(seconds: float) -> str:
    """ "43 s", "5 min 12 s", "3 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _of_zero_shot(result: ZeroShotResult) -> list[Figure]:
    first, fifth, _ = result.measures()
    return [
        Figure(
            percent(first.value),
            "top-1",
            f"Images whose right name comes first, of {result.n:,} (± {100 * first.margin:.1f} points). "
            f"{times(first.times_chance)} × chance.",
        ),
        Figure(
            percent(fifth.value),
            "top-5",
            f"Right name among the first five. {times(fifth.times_chance)} × chance ({percent(fifth.chance)}).",
        ),
        Figure(
            percent(result.chance),
            "chance",
            f"Top-1 of blind guessing: one name in {result.classes:,}.",
        ),
    ]


def _of_retrieval(result: RetrievalResult) -> list[Figure]:
    text, image = result.text_to_image, result.image_to_text
    return [
        Figure(
            percent(text.r1),
            "R@1, text → image",
            f"Captions that find their image first among {text.candidates:,}. "
            f"{times(text.r1 / text.chance1)} × chance ({percent(text.chance1)}).",
        ),
        Figure(
            percent(image.r1),
            "R@1, image → text",
            f"Images that find a caption of theirs first among {image.candidates:,}. "
            f"{times(image.r1 / image.chance1)} × chance ({percent(image.chance1)}).",
        ),
    ]


def _last_zero_shot(run: Run, on: str | None) -> ZeroShotResult | None:
    found = [row.result for row in run.evaluations if row.result.on == on]
    return next((result for result in reversed(found) if isinstance(result, ZeroShotResult)), None)


def _last_retrieval(run: Run, on: str | None) -> RetrievalResult | None:
    found = [row.result for row in run.evaluations if row.result.on == on]
    return next((result for result in reversed(found) if isinstance(result, RetrievalResult)), None)
