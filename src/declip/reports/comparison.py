"""The page of a comparison and its terminal output."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.text import Text

from declip.comparison.outcome import (
    ComparedFactor,
    Curves,
    MeasureFacts,
    Outcome,
    compared_factors,
    measure_facts,
    near_chance,
)
from declip.comparison.runner import ROUNDS, TIMED
from declip.comparison.statistics import EfficiencyCurve
from declip.comparison.study import Study
from declip.io.atomic import write_text
from declip.io.text import percent
from declip.reports.charts import Chart, pairs_chart
from declip.reports.page import NONE, Table, render, rich_table, span


def write_page(outcome: Outcome, folder: Path) -> Path:
    """Write report.html of a comparison, complete or not, and return its path."""
    return write_text(folder / "report.html", render("comparison.html", **context(outcome)))


def summary(outcome: Outcome) -> Group:
    """Format the result for the terminal: every score with its interval and n, and the factors."""
    content = context(outcome)
    parts: list[Any] = []
    for table in (*content["score_tables"], *content["factor_tables"], content["failures_table"]):
        if table.rows:
            parts += [Text(table.caption, "bold"), rich_table(table), Text()]
    return Group(*parts, Text(render("comparison.txt", **content).strip()))


def context(outcome: Outcome) -> dict[str, Any]:
    """Compute the numbers and tables of the templates."""
    study, curves, facts = outcome.study, outcome.curves(), measure_facts(outcome)
    headline = next(iter(facts), "")
    factors = compared_factors(study, curves[headline]) if headline else []
    return {
        "study": study,
        "outcome": outcome,
        "rows": list(outcome.rows.values()),
        "trials": len(study.trials()),
        "facts": facts,
        "headline": headline,
        "factors": factors,
        "near_chance": near_chance(study, curves[headline], facts[headline]) if headline else {},
        "common": settings(common_overrides(study)),
        "commands": [shlex.join(words) for words in study.commands],
        "timed_steps": (ROUNDS * TIMED, ROUNDS),
        "variants_table": variants_table(study),
        "measures_table": measures_table(facts),
        "failures_table": failures_table(outcome.failures),
        "factor_tables": [factors_table(factors, budget, study) for budget in study.budgets] if factors else [],
        "score_tables": [
            scores_table(study, measure, budget, of_budget)
            for measure, of_measure in curves.items()
            for budget, of_budget in of_measure.items()
        ],
        "cost_table": cost_table(study),
        "curves": {
            measure: curve_charts(study, curves[measure], measure, fact.chance) for measure, fact in facts.items()
        },
    }


def common_overrides(study: Study) -> dict[str, Any]:
    """Overrides that all variants have."""
    first, *others = [variant.overrides for variant in study.variants]
    return {key: value for key, value in first.items() if all((key, value) in other.items() for other in others)}


def settings(values: Mapping[str, Any]) -> str:
    """Format keys and values in one line, as on the command line."""
    return ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def variants_table(study: Study) -> Table:
    """The recipe of each variant, and its overrides other than the common ones."""
    common, rows = common_overrides(study), []
    for variant in study.variants:
        own = {key: value for key, value in variant.overrides.items() if key not in common}
        rows.append((variant.name, variant.recipe, settings(own) or NONE))
    return Table("Variants", ("variant", "recipe", "overrides"), tuple(rows), texts=3)


def measures_table(facts: Mapping[str, MeasureFacts]) -> Table:
    """Each measure with n, chance and candidates."""
    rows = tuple((name, fact.among, f"{fact.n:,}", percent(fact.chance)) for name, fact in facts.items())
    return Table("Measures, after the last step of each run", ("measure", "among", "n", "chance"), rows, texts=2)


def scores_table(study: Study, measure: str, budget: str, curves: Mapping[str, EfficiencyCurve]) -> Table:
    """Variant by number of pairs: mean over the seeds, its interval, and the number of seeds."""
    rows = tuple((name, *(_score(curves[name], pairs) for pairs in study.pairs)) for name in study.names)
    caption = f"{measure}, equal {budget}: mean ± 95 % interval in % (seeds)"
    return Table(caption, ("variant", *(f"{pairs:,} pairs" for pairs in study.pairs)), rows)


def _score(curve: EfficiencyCurve, pairs: int) -> str:
    """Format a score as "36.7 ± 1.2 (3)", with the same decimals in the interval as in the mean."""
    if pairs not in curve.pairs:
        return NONE
    at = curve.pairs.index(pairs)
    value, half = percent(float(curve.means[at])).removesuffix(" %"), curve.half_widths[at]
    interval = "" if np.isnan(half) else f" ± {100 * half:.{len(value.partition('.')[2])}f}"
    return f"{value}{interval} ({len(curve.values[at])})"


def factors_table(factors: Sequence[ComparedFactor], budget: str, study: Study) -> Table:
    """Factors by variant under a budget: their mean, and at each of the baseline's numbers of pairs."""
    rows = []
    for name, _, factor in (each for each in factors if each.budget == budget):
        cells, interval = dict.fromkeys(study.pairs, NONE), NONE
        for at in factor.at if factor else ():
            outside = "exceeded" if at.outside == "below" else "not reached"
            cells[at.pairs] = outside if at.factor is None else f"{at.factor:.2f}"
        mean = NONE if factor is None or factor.mean is None else f"{factor.mean:.2f}"
        if factor and factor.low is not None and factor.high is not None:
            interval = span(factor.low, factor.high)
        rows.append((name, mean, interval, *cells.values()))
    columns = ("variant", "factor", "95 % interval", *(f"at {pairs:,}" for pairs in study.pairs))
    return Table(f"Data-efficiency factor over {study.baseline}, equal {budget}", columns, tuple(rows))


def cost_table(study: Study) -> Table:
    """Seconds per step, and steps under each budget; no rows before all variants were timed."""
    rows = []
    for name in study.names if len(study.seconds) == len(study.names) else ():
        seconds, steps = study.seconds[name], [study.steps_of(name, budget) for budget in study.budgets]
        ratio = seconds / study.seconds[study.baseline]
        counts = (f"{each:,} ({each * study.batch_size:,})" for each in steps)
        rows.append((name, f"{seconds:.3g}", f"{ratio:.2f}", *counts))
    budgets = (f"steps (samples), equal {each}" for each in study.budgets)
    columns = ("variant", "seconds per step", f"ratio to {study.baseline}", *budgets)
    return Table("Cost per step, and number of steps", columns, tuple(rows))


def failures_table(failures: Mapping[str, str]) -> Table:
    """Failed runs with the last line of their reason."""
    rows = ((name, (reason.strip().splitlines() or ["no reason was saved"])[-1]) for name, reason in failures.items())
    return Table("Failed runs", ("run", "reason"), tuple(rows), texts=2)


def curve_charts(study: Study, curves: Curves, measure: str, chance: float) -> list[Chart]:
    """Draw the curves of one measure under each budget, with the same axis; the baseline comes first."""
    names = [study.baseline, *(name for name in study.names if name != study.baseline)]
    every = [curve for of_budget in curves.values() for curve in of_budget.values()]
    # The axis includes every value, and intervals only as far as the curves stay readable.
    highest = max([chance, *(value for curve in every for row in curve.values for value in row)])
    ends = [end for curve in every for end in curve.means + curve.half_widths]
    top = 1.06 * min(np.nanmax([highest, *ends]), 1.3 * highest) or 0.01
    unit = measure.rpartition(": ")[2]
    return [
        pairs_chart(f"equal {budget}", unit, {name: of_budget[name] for name in names}, study.pairs, chance, top)
        for budget, of_budget in curves.items()
    ]
