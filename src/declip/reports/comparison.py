"""The page of a comparison and its terminal output."""

import json
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from rich.console import Group
from rich.text import Text

from declip.comparison.outcome import (
    Curves,
    EfficiencyCurve,
    Factor,
    Outcome,
    compared_factors,
    near_chance,
)
from declip.comparison.study import Study
from declip.evaluation.results import Result
from declip.io.atomic import write_text
from declip.io.text import percent
from declip.reports.charts import CHANCE, COLORS, DASHES, MARKERS, Chart, legend, over_pairs
from declip.reports.page import NONE, Table, render, rich_table, span


def write_page(outcome: Outcome, folder: Path) -> Path:
    """Write report.html of a comparison, complete or not, and return its path."""
    html = render("comparison.html", **context(outcome))
    return write_text(folder / "report.html", html)


def summary(outcome: Outcome) -> Group:
    """Format the result for the terminal: every score with its interval and n, and the factors."""
    content = context(outcome)
    parts: list[Any] = []
    others = [content[f"{name}_table"] for name in ("factors", "cost", "failures")]
    for table in [*content["score_tables"], *others]:
        if table.rows:
            parts += [Text(table.caption, "bold"), rich_table(table), Text()]
    return Group(*parts, Text(render("comparison.txt", **content).strip()))


def context(outcome: Outcome) -> dict[str, Any]:
    """Compute the numbers and tables of the templates."""
    # The first measure is the headline: factors are computed for it alone.
    study = outcome.study
    curves = outcome.curves()
    facts = outcome.facts
    headline = next(iter(facts), "")
    factors: Mapping[str, Factor | None] = {}
    near: Sequence[int] = []
    if headline:
        factors = compared_factors(study, curves[headline])
        near = near_chance(curves[headline][study.baseline], facts[headline].headline)
    return {
        "study": study,
        "outcome": outcome,
        "trials": len(study.trials()),
        "facts": facts,
        "headline": headline,
        "factors": factors,
        "near_chance": near,
        "variants_table": variants_table(study),
        "measures_table": measures_table(facts),
        "failures_table": failures_table(outcome.failures),
        "factors_table": factors_table(factors, study),
        "score_tables": [
            scores_table(study, measure, of_measure) for measure, of_measure in curves.items()
        ],
        "cost_table": cost_table(outcome),
        "charts": {
            measure: curve_chart(study, curves[measure], measure, fact.headline.chance)
            for measure, fact in facts.items()
        },
    }


def variants_table(study: Study) -> Table:
    """The recipe and the overrides of each variant, as on the command line."""
    rows = []
    for variant in study.variants:
        keys = list[str]()
        for key, value in variant.overrides.items():
            text = value
            if not isinstance(value, str):
                text = json.dumps(value)
            keys.append(f"{key}={text}")
        rows.append((variant.name, variant.recipe, ", ".join(keys) or NONE))
    return Table("Variants", ("variant", "recipe", "overrides"), tuple(rows), texts=3)


def measures_table(facts: Mapping[str, Result]) -> Table:
    """Each measure with n, chance and candidates."""
    rows = tuple(
        (name, fact.among, f"{fact.headline.n:,}", percent(fact.headline.chance))
        for name, fact in facts.items()
    )
    columns = ("measure", "among", "n", "chance")
    return Table("Measures, after the last step of each run", columns, rows, texts=2)


def scores_table(study: Study, measure: str, curves: Curves) -> Table:
    """Variant by number of pairs: mean over the seeds, its interval, and the number of seeds."""
    rows = []
    for name in study.names:
        scores = [_score(curves[name], pairs) for pairs in study.pairs]
        rows.append((name, *scores))
    columns = ("variant", *(f"{pairs:,} pairs" for pairs in study.pairs))
    return Table(f"{measure}: mean ± 95 % interval in % (seeds)", columns, tuple(rows))


def _score(curve: EfficiencyCurve, pairs: int) -> str:
    """Format a score as "36.7 ± 1.2 (3)", with the same decimals in the interval as in the mean."""
    if pairs not in curve.pairs:
        return NONE
    at = curve.pairs.index(pairs)
    value = percent(float(curve.means[at])).removesuffix(" %")
    half = curve.half_widths[at]
    interval = ""
    if not np.isnan(half):
        digits = len(value.partition(".")[2])
        interval = f" ± {100 * half:.{digits}f}"
    return f"{value}{interval} ({len(curve.values[at])})"


def factors_table(factors: Mapping[str, Factor | None], study: Study) -> Table:
    """Factors by variant: their mean, and at each of the baseline's numbers of pairs."""
    rows = []
    for name, factor in factors.items():
        cells = dict.fromkeys(study.pairs, NONE)
        mean = interval = NONE
        for at in factor.at if factor else ():
            if at.factor is not None:
                cell = f"{at.factor:.2f}"
            elif at.outside == "below":
                cell = "exceeded"
            else:
                cell = "not reached"
            cells[at.pairs] = cell
        if factor and factor.mean is not None:
            mean = f"{factor.mean:.2f}"
        if factor and factor.low is not None and factor.high is not None:
            interval = span(factor.low, factor.high)
        rows.append((name, mean, interval, *cells.values()))
    columns = ("variant", "factor", "95 % interval", *(f"at {pairs:,}" for pairs in study.pairs))
    return Table(f"Data-efficiency factor over {study.baseline}", columns, tuple(rows))


def cost_table(outcome: Outcome) -> Table:
    """Steps, samples and median seconds of the finished runs of each variant; at equal compute, measured steps."""
    study = outcome.study
    times: dict[str, list[float]] = {name: [] for name in study.names}
    for row in outcome.rows.values():
        times[row["variant"]].append(row["seconds"])
    seconds = {name: median(values or [0.0]) for name, values in times.items()}
    base = seconds[study.baseline]
    rows = []
    for variant in study.variants:
        own = seconds[variant.name]
        per_step = () if variant.seconds is None else (f"{variant.seconds:.3g}",)
        counts = (f"{variant.steps:,}", f"{variant.samples:,}")
        took = ratio = NONE
        if own:
            took = f"{own:,.0f}"
        if own and base:
            ratio = f"{own / base:.2f}"
        rows.append((variant.name, *per_step, *counts, took, ratio))
    timed = ("seconds per step",) if study.budget == "compute" else ()
    columns = ("variant", *timed, "steps", "samples", "seconds", f"ratio to {study.baseline}")
    return Table("Cost of a run (median)", columns, tuple(rows))


def failures_table(failures: Mapping[str, str]) -> Table:
    """Failed runs with the last line of their reason."""
    rows = []
    for name, reason in failures.items():
        lines = reason.strip().splitlines() or ["no reason was saved"]
        rows.append((name, lines[-1]))
    return Table("Failed runs", ("run", "reason"), tuple(rows), texts=2)


def curve_chart(study: Study, curves: Curves, measure: str, chance: float) -> Chart:
    """Draw curves against the number of pairs: means, intervals as bars, small dots for seeds, chance dotted.

    The baseline comes first; empty curves are skipped.
    """
    pairs = study.pairs
    names = sorted(study.names, key=lambda name: name != study.baseline)
    shown = {name: curves[name] for name in names if curves[name].pairs}
    # --- the axis includes every value, and intervals only as far as the curves stay readable
    values = [chance]
    ends = [chance]
    for curve in shown.values():
        values += chain(*curve.values)
        ends += [*(curve.means + curve.half_widths)]
    highest = max(values)
    top = 1.06 * min(np.nanmax([highest, *ends]), 1.3 * highest) or 0.01
    # --- positions: lines are shifted slightly against each other, in log(pairs), so that bars do not overlap
    logs = np.log(pairs)
    width = logs[-1] - logs[0]
    widest = 0.8 * np.diff(logs) / max(len(shown), 1)
    step = min([0.02 * (1.12 * width or 1.0), *widest])
    margin = 0.5
    if len(pairs) > 1:
        margin = max(0.06 * width, 0.6 * step * (len(shown) + 1))

    def draw(ax: Axes) -> None:
        over_pairs(ax, pairs)
        unit = measure.rpartition(": ")[2]
        ax.set(xlabel="distinct pairs", ylabel=f"{unit}, %", ylim=(0, 100 * top))
        left = np.exp(logs[0] - margin)
        right = np.exp(logs[-1] + margin)
        ax.set_xlim(left, right)
        ax.axhline(100 * chance, **CHANCE)
        for name, curve in shown.items():
            number = names.index(name)
            shift = number - (len(names) - 1) / 2
            x = np.array(curve.pairs) * np.exp(step * shift)
            style: Any = {
                # The space: matplotlib ignores labels that start with "_".
                "label": f" {name}",
                "color": COLORS[number % len(COLORS)],
                "fmt": MARKERS[number % len(MARKERS)],
                "linestyle": DASHES[number % len(DASHES)],
                "linewidth": 1.8,
                "elinewidth": 1,
                "capsize": 2.5,
                "markersize": 5,
            }
            ax.errorbar(x, 100 * curve.means, 100 * curve.half_widths, **style)
            counts = [len(values) for values in curve.values]
            across = np.repeat(x * np.exp(step / 2), counts)
            seeds = 100 * np.concatenate(curve.values)
            ax.plot(across, seeds, ".", color=style["color"], markersize=3.5, alpha=0.7)
        legend(ax)

    words = "; ".join(f"{name} up to {percent(max(curve.means))}" for name, curve in shown.items())
    size = (4.1, 3.4 + 0.1 * len(shown))
    return Chart(f"{words}, with {pairs[0]:,} to {pairs[-1]:,} pairs.", size, draw)
