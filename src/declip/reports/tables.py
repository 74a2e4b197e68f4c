"""Tables of results and of skipped pairs, for pages and the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from declip.evaluation.results import Measure, Result, RetrievalResult, ZeroShotResult, short_names
from declip.io.text import percent, round_two_digits
from declip.reports.page import NONE, Table, points, render


def skipped_table(skipped: Mapping[str, Any] | None) -> Table:
    """List why pairs were skipped, the most frequent reason first."""
    reasons = (skipped or {}).get("reasons", {})
    rows = []
    for reason, row in sorted(reasons.items(), key=lambda item: -item[1]["count"]):
        rows.append((reason, ", ".join(row["examples"]), f"{row['count']:,}"))
    return Table("Skipped pairs", ("reason", "for example", "times"), tuple(rows), texts=2)


def mixture_lines(mixture: Mapping[str, Any]) -> list[str]:
    """Describe the mixture with the start, if there is one."""
    if not mixture:
        return []
    names = short_names({name for scores in mixture["scores"].values() for name in scores})
    return render("mixture.txt", mixture=mixture, names=names).strip().splitlines()


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
            start = starts.get((result.dataset, result.task, measure.name))
            if start is not None:
                cells += (percent(start), points(measure.value - start))
            elif starts:
                cells += (NONE, NONE)
            rows.append(cells)
    columns = ["set", "measure", "value", "chance", "× chance", "n"]
    if starts:
        columns += ["before", "change, points"]
    return Table("Validation sets", tuple(columns), tuple(rows), texts=2)


def results_table(results: Sequence[Result]) -> Table:
    """List every score of some results, and the numbers of skipped pairs and truncated captions."""
    names, rows = short_names(result.dataset for result in results), []
    for result in results:
        rows += [(names[result.dataset], *measure_cells(measure)) for measure in result.measures()]
        notes = dict(result.skipped)
        if isinstance(result, RetrievalResult):
            notes["captions longer than the model's context"] = result.truncated_captions
        if isinstance(result, ZeroShotResult) and result.by_tokens:
            notes["images whose patches were compared with words"] = result.n
        rows += [
            (names[result.dataset], note, NONE, NONE, NONE, f"{count:,}")
            for note, count in notes.items()
            if count
        ]
    return Table(
        "Results", ("set", "measure", "value", "chance", "× chance", "n"), tuple(rows), texts=2
    )


def measure_cells(measure: Measure) -> tuple[str, ...]:
    """Name, value, chance level with that of the largest class, multiple of chance, and n."""
    largest = "" if measure.majority is None else f" (largest class {percent(measure.majority)})"
    chance = percent(measure.chance) + largest, round_two_digits(measure.times_chance)
    return measure.name, percent(measure.value), *chance, f"{measure.n:,}"
