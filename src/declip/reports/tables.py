"""Tables of results and of skipped pairs, for pages and the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from declip.evaluation.results import Measure, Result, RetrievalResult, ZeroShotResult, short_names
from declip.io.text import percent, round_two_digits
from declip.reports.page import NONE, Table, points, render

COLUMNS = ("set", "measure", "value", "chance", "× chance", "n")
CHANGE = ("before", "change, points")  # see `change_cells`


def skipped_table(skipped: Mapping[str, Any] | None) -> Table:
    """List why pairs were skipped, the most frequent reason first."""
    reasons = (skipped or {}).get("reasons", {})
    rows = []
    for reason in sorted(reasons, key=lambda reason: -reasons[reason]["count"]):
        row = reasons[reason]
        examples = ", ".join(row["examples"])
        rows.append((reason, examples, f"{row['count']:,}"))
    return Table("Skipped pairs", ("reason", "for example", "times"), tuple(rows), texts=2)


def mixture_lines(mixture: Mapping[str, Any]) -> list[str]:
    """Describe the mixture with the start, if there is one."""
    if not mixture:
        return []
    names = short_names({name for scores in mixture["scores"].values() for name in scores})
    text = render("mixture.txt", mixture=mixture, names=names)
    return text.strip().splitlines()


def compared_table(results: Sequence[Result], before: Sequence[Result]) -> Table:
    """List every score of some results, with those of the start where it was measured too."""
    names = short_names(result.dataset for result in results)
    starts = {}
    for result in before:
        for measure in result.measures():
            starts[result.dataset, result.task, measure.name] = measure.value
    rows = []
    for result in results:
        for measure in result.measures():
            cells = (names[result.dataset], *measure_cells(measure))
            if starts:
                start = starts.get((result.dataset, result.task, measure.name))
                cells += change_cells(measure.value, start)
            rows.append(cells)
    columns = (*COLUMNS, *CHANGE) if starts else COLUMNS
    return Table("Validation sets", columns, tuple(rows), texts=2)


def results_table(results: Sequence[Result]) -> Table:
    """List every score of some results, and the numbers of skipped pairs and truncated captions."""
    names = short_names(result.dataset for result in results)
    rows = list[tuple[str, ...]]()
    for result in results:
        name = names[result.dataset]
        for measure in result.measures():
            rows.append((name, *measure_cells(measure)))
        notes = dict(result.skipped)
        if isinstance(result, RetrievalResult):
            notes["captions longer than the model's context"] = result.truncated_captions
        if isinstance(result, ZeroShotResult) and result.by_tokens:
            notes["images whose patches were compared with words"] = result.n
        for note, count in notes.items():
            if count:
                rows.append((name, note, NONE, NONE, NONE, f"{count:,}"))
    return Table("Results", COLUMNS, tuple(rows), texts=2)


def change_cells(value: float, start: float | None) -> tuple[str, str]:
    """The value at the start, and the difference in points."""
    if start is None:
        return NONE, NONE
    return percent(start), points(value - start)


def measure_cells(measure: Measure) -> tuple[str, ...]:
    """Name, value, chance level with that of the largest class, multiple of chance, and n."""
    chance = percent(measure.chance)
    if measure.majority is not None:
        chance += f" (largest class {percent(measure.majority)})"
    multiple = round_two_digits(measure.times_chance)
    return measure.name, percent(measure.value), chance, multiple, f"{measure.n:,}"
