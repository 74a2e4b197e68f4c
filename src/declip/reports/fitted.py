"""The report of a fit in closed form: one HTML file, and the same sentences for the terminal."""

from collections.abc import Mapping
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from declip.closed_form.choice import FEWEST
from declip.evaluation.datasets import Dataset
from declip.evaluation.results import short_names
from declip.io.atomic import write_text
from declip.io.text import plural
from declip.models.encoder import Encoder
from declip.reports.charts import growth_chart
from declip.reports.page import render
from declip.reports.retrieval import retrieval_section
from declip.reports.tables import compared_table, mixture_lines, skipped_table
from declip.runs.fitted import FittedRun

# Of the percentile: where the interval ends below it, more pairs would not show a useful gain
LEAST_GAIN = 0.01
MOST_TIMES = 10  # times as many pairs, up to which their number is stated


class Verdict(NamedTuple):
    """Whether left-out pairs are ranked better than before."""

    kind: Literal["better", "no better", "unclear"]
    more: int = 0  # pairs that would decide, if it is unclear; 0 for more than `MOST_TIMES` as many


def verdict_of(gain: Mapping[str, float], pairs: int) -> Verdict:
    """Judge a gain by its 95 % interval, whose width falls with the square root of the number of pairs."""
    value = gain["value"]
    low = gain["low"]
    high = gain["high"]
    if low > 0:
        return Verdict("better")
    if value <= 0 or high < LEAST_GAIN:
        return Verdict("no better")
    times = ((value - low) / value) ** 2
    more = 0
    if times <= MOST_TIMES:
        more = ceil(pairs * (times - 1))
    return Verdict("unclear", more)


def fitted_lines(run: FittedRun) -> list[str]:
    """Describe the heads, what cross-validation says about them, and the mixture with the start."""
    fitted = run.cross_validation
    verdict = None
    if "gain" in fitted:
        verdict = verdict_of(fitted["gain"], fitted["pairs"])
    text = render("fitted.txt", it=fitted, fewest=FEWEST, verdict=verdict)
    return text.strip().splitlines() + mixture_lines(run.mixture)


def first_line(queries: Mapping[str, Any]) -> str:
    """Say how many left-out captions rank the right image first, and by the start."""
    counts = queries["counts"]
    total = plural(sum(counts.values()), "left-out caption")
    now = counts["now"] + counts["both"]
    line = f"The right image comes first for {now:,} of {total}"
    if queries["compared"]:
        before = counts["before"] + counts["both"]
        line += f"; before fine-tuning it did for {before:,}"
    return f"{line}."


def place_of(percentile: Mapping[str, float] | None) -> int | None:
    """The mean place of the right one among 100, by the mean fraction of the others that it beats."""
    if percentile is None:
        return None
    return round(100 - 99 * percentile["value"])


def write_fitted_report(
    run: FittedRun,
    name: str,
    facts: Mapping[str, str],
    held_out: Dataset | None,
    model: Encoder,
) -> Path:
    """Write report.html into the folder of a fit, from its files.

    Args:
        name: Title of the page.
        facts: Short sentences below the title.
        held_out: The validation set whose searches are shown; None: no searches.
    """
    grown = run.cross_validation.get("growth", {})
    queries = run.facts.get("queries")
    open_source = None if held_out is None else partial(held_out.split, "test")
    source = run.facts["source"]
    content = render(
        "fitted.html",
        name=name,
        facts=facts,
        run=run,
        source=source,
        lines=fitted_lines(run),
        queries=queries,
        first_line=first_line(queries) if queries else None,
        place=place_of(run.cross_validation.get("percentile")),
        place_of_start=place_of(run.cross_validation.get("percentile_of_start")),
        growth=growth_chart(grown).svg("growth") if grown.get("measured") else None,
        results_table=compared_table(run.results, run.results_of_start),
        set_names=short_names(result.dataset for result in run.results),
        skipped_table=skipped_table(run.skipped),
        dataset=held_out and held_out.name,
        **retrieval_section(open_source, model, source["credit"]),
    )
    return write_text(run.report, content)
