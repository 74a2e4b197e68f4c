"""The result of a comparison: numbers for the page, for Markdown and for the terminal."""

import json
import shlex
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Group
from rich.text import Text

from declip.comparison.ablation import Ablation, measured_sizes, read_ablation
from declip.comparison.outcome import Outcome, scores, sweep_score
from declip.comparison.runner import ROUNDS, TIMED
from declip.comparison.statistics import EfficiencyCurve, Factor
from declip.comparison.study import Study
from declip.evaluation.results import ClassificationResult, RetrievalResult, read_result
from declip.io.atomic import write_text
from declip.io.text import percent
from declip.reports.charts import Chart, pairs_chart
from declip.reports.page import NONE, Table, points, render, rich_table, span


class MeasureFacts(NamedTuple):
    """The test set behind a measure: images, chance level, and candidates in words."""

    n: int
    chance: float
    among: str


class ComparedFactor(NamedTuple):
    """The factor of a variant over the baseline under a budget; None when both have not been measured yet."""

    variant: str
    budget: str
    factor: Factor | None


def write_page(outcome: Outcome, folder: Path) -> tuple[Path, Path]:
    """Write report.html and results.md of a comparison, complete or not; returns their paths."""
    content = context(outcome)
    page = write_text(folder / "report.html", render("comparison.html", **content))
    return page, write_text(folder / "results.md", render("comparison.md", **content))


def summary(outcome: Outcome) -> Group:
    """The result for the terminal: every score with its interval and n, and the factors of the first measure."""
    content = context(outcome)
    parts: list[Any] = []
    for table in (*content["score_tables"], *content["factor_tables"], content["failures_table"]):
        if table.rows:
            parts += [Text(table.caption, "bold"), rich_table(table), Text()]
    return Group(*parts, Text(render("comparison.txt", **content).strip()))


def context(outcome: Outcome) -> dict[str, Any]:
    """The numbers that the templates are fed."""
    study, facts = outcome.study, measure_facts(outcome)
    foremost = next(iter(facts), "")
    factors = compared_factors(outcome, foremost)
    ablation = read_ablation(study)
    sizes = measured_sizes(outcome, ablation, foremost) if ablation and foremost else []
    return {
        "study": study,
        "outcome": outcome,
        "rows": [*outcome.rows.values(), *outcome.sweep.values()],
        "trials": len(study.trials()),
        "tries": len(study.sweep_trials()),
        "facts": facts,
        "foremost": foremost,
        "headline": [each for each in factors if each.variant in study.named],
        "near_chance": {budget: near_chance(outcome, budget, foremost, facts) for budget in study.budgets},
        "ablation": ablation,
        "common": settings(common_overrides(study)),
        "commands": [shlex.join(words) for words in study.commands],
        "timed_steps": (ROUNDS * TIMED, ROUNDS),
        "variants_table": variants_table(study),
        "measures_table": measures_table(facts),
        "failures_table": failures_table(outcome),
        "factor_tables": [factors_table(factors, budget, study) for budget in study.budgets] if factors else [],
        "score_tables": [scores_table(outcome, measure, budget) for measure in facts for budget in study.budgets],
        "cost_table": cost_table(study),
        "sweep_table": sweep_table(outcome),
        "curves": {measure: curve_charts(outcome, measure, fact.chance) for measure, fact in facts.items()},
        "parts": [parts_table(outcome, ablation, foremost, pairs) for pairs in sizes if ablation],
    }


def measure_facts(outcome: Outcome) -> dict[str, MeasureFacts]:
    """The test set behind each measure, by the first trial that has it."""
    facts: dict[str, MeasureFacts] = {}
    for raw in (raw for row in outcome.rows.values() for raw in row["results"]):
        result = read_result(raw)
        for name in scores([raw]).keys() - facts.keys():
            if isinstance(result, RetrievalResult):
                chance = (result.text_to_image.chance1 + result.image_to_text.chance1) / 2
                among = f"{result.images:,} images and {result.texts:,} captions"
                facts[name] = MeasureFacts(result.images, chance, among)
            elif isinstance(result, ClassificationResult):
                first = result.measures()[0]
                largest = "" if first.majority is None else f", the largest with {percent(first.majority)}"
                facts[name] = MeasureFacts(first.n, first.chance, f"{result.classes:,} classes{largest}")
    return facts


def compared_factors(outcome: Outcome, measure: str) -> list[ComparedFactor]:
    """The factor of each variant over the baseline under each budget."""
    study, baseline, factors = outcome.study, outcome.study.baseline, []
    others = [variant.name for variant in study.variants if variant.name != baseline] if measure else []
    for name, budget in product(others, study.budgets):
        both = all(outcome.curve(each, budget, measure).pairs for each in (name, baseline))
        factor = outcome.factor(name, baseline, budget, measure) if both else None
        factors.append(ComparedFactor(name, budget, factor))
    return factors


def near_chance(outcome: Outcome, budget: str, measure: str, facts: Mapping[str, MeasureFacts]) -> list[int]:
    """Numbers of pairs at which the baseline is within two standard errors of chance: a factor there means nothing."""
    if not measure:
        return []
    curve, (n, chance, _) = outcome.curve(outcome.study.baseline, budget, measure), facts[measure]
    limit = chance + 2 * np.sqrt(chance * (1 - chance) / n)
    return [pairs for pairs, mean in zip(curve.pairs, curve.means, strict=True) if mean <= limit]


def common_overrides(study: Study) -> dict[str, Any]:
    """Overrides that all variants have."""
    first, *others = [variant.overrides for variant in study.variants]
    return {key: value for key, value in first.items() if all((key, value) in other.items() for other in others)}


def settings(values: Mapping[str, Any]) -> str:
    """Keys and values in a line, as the command reads them."""
    return ", ".join(f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())


def variants_table(study: Study) -> Table:
    """Each variant's recipe, and what it overrides beyond the common overrides."""
    common, rows = common_overrides(study), []
    for variant in study.variants:
        own = {key: value for key, value in variant.overrides.items() if key not in common}
        rows.append((variant.name, variant.recipe, settings(own) or NONE))
    return Table("Variants", ("variant", "recipe", "overrides"), tuple(rows), texts=3)


def measures_table(facts: Mapping[str, MeasureFacts]) -> Table:
    """Each measure with n, chance and what is chosen among."""
    rows = tuple((name, fact.among, f"{fact.n:,}", percent(fact.chance)) for name, fact in facts.items())
    return Table("Measured after the last step of each run", ("measure", "among", "n", "chance"), rows, texts=2)


def scores_table(outcome: Outcome, measure: str, budget: str) -> Table:
    """Variant by number of pairs: mean over the seeds, its interval, how many seeds."""
    sizes, rows = outcome.study.pairs, []
    for variant in outcome.study.variants:
        curve = outcome.curve(variant.name, budget, measure)
        rows.append((variant.name, *(_score(curve, pairs) for pairs in sizes)))
    caption = f"{measure}, equal {budget}: mean ± 95 % interval in % (seeds)"
    return Table(caption, ("variant", *(f"{pairs:,} pairs" for pairs in sizes)), tuple(rows))


def _score(curve: EfficiencyCurve, pairs: int) -> str:
    """ "36.7 ± 1.2 (3)", with as many decimals in the interval as in the mean."""
    if pairs not in curve.pairs:
        return NONE
    at = curve.pairs.index(pairs)
    value, half = percent(float(curve.means[at])).removesuffix(" %"), curve.half_widths[at]
    interval = "" if np.isnan(half) else f" ± {100 * half:.{len(value.partition('.')[2])}f}"
    return f"{value}{interval} ({len(curve.values[at])})"


def factors_table(factors: Sequence[ComparedFactor], budget: str, study: Study) -> Table:
    """Factors by variant under a budget, in all and at each of the baseline's numbers of pairs."""
    rows = []
    for name, _, factor in (each for each in factors if each.budget == budget):
        cells, interval = dict.fromkeys(study.pairs, NONE), NONE
        for at in factor.at if factor else ():
            outside = "passed" if at.outside == "below" else "not reached"
            cells[at.pairs] = outside if at.factor is None else f"{at.factor:.2f}"
        mean = NONE if factor is None or factor.mean is None else f"{factor.mean:.2f}"
        if factor and factor.low is not None and factor.high is not None:
            interval = span(factor.low, factor.high)
        rows.append((name, mean, interval, *cells.values()))
    columns = ("variant", "factor", "95 % interval", *(f"at {pairs:,}" for pairs in study.pairs))
    return Table(f"Data-efficiency factor over {study.baseline}, equal {budget}", columns, tuple(rows))


def parts_table(outcome: Outcome, ablation: Ablation, measure: str, pairs: int) -> Table:
    """Each part of the ablation: its score and its difference to the whole, under every budget."""
    budgets, rows = outcome.study.budgets, []
    parts = ((group, *part) for group, parts in ablation.groups.items() for part in parts.items())
    for group, label, variant in parts:
        cells = [group, label]
        for budget in budgets:
            values = list(outcome.values(variant, budget, pairs, measure).values())
            more = outcome.difference(variant, ablation.whole, budget, pairs, measure)
            difference = NONE if more is None or variant == ablation.whole else points(more.mean)
            if difference != NONE and more and more.low is not None and more.high is not None:
                difference += f" ({points(more.low)} to {points(more.high)})"
            cells += [percent(float(np.mean(values))) if values else NONE, difference]
        rows.append(tuple(cells))
    columns = ["group", "part", *(name for budget in budgets for name in (f"equal {budget}", "− whole, points"))]
    return Table(f"Parts of {ablation.whole} with {pairs:,} pairs: {measure}", tuple(columns), tuple(rows), texts=2)


def cost_table(study: Study) -> Table:
    """Seconds a step, and steps under each budget; no rows before the variants were timed."""
    rows = []
    for name in (variant.name for variant in study.variants if len(study.seconds) == len(study.variants)):
        seconds, steps = study.seconds[name], [study.steps_of(name, budget) for budget in study.budgets]
        ratio = seconds / study.seconds[study.baseline]
        counts = (f"{each:,} ({each * study.batch_size:,})" for each in steps)
        rows.append((name, f"{seconds:.3g}", f"{ratio:.2f}", *counts))
    budgets = (f"steps (samples), equal {each}" for each in study.budgets)
    columns = ("variant", "seconds a step", f"over {study.baseline}", *budgets)
    return Table("Cost of a step, and number of steps", columns, tuple(rows))


def sweep_table(outcome: Outcome) -> Table:
    """What each variant tried, and which it kept; no rows without a sweep."""
    study, rows = outcome.study, []
    for trial in study.sweep_trials():
        row = outcome.sweep.get(trial.id)
        kept = dict(study.chosen.get(trial.variant, {})) == dict(trial.overrides)
        score = NONE if row is None else percent(sweep_score(row))
        rows.append((trial.variant, settings(trial.overrides), "chosen" if kept else "", score))
    caption = f"Sweep on {', '.join(study.sweep.datasets)}" if study.sweep else ""
    return Table(caption, ("variant", "values", "", "score"), tuple(rows), texts=3)


def failures_table(outcome: Outcome) -> Table:
    """Failed runs with the last line of their reason."""
    rows = tuple(
        (name, (reason.strip().splitlines() or ["no reason was left"])[-1]) for name, reason in outcome.failures.items()
    )
    return Table("Runs that failed", ("run", "reason"), rows, texts=2)


def curve_charts(outcome: Outcome, measure: str, chance: float) -> list[Chart]:
    """Curves of the named variants under each budget, with one axis."""
    study = outcome.study
    names = [study.baseline, *(name for name in study.named if name != study.baseline)]
    curves = {budget: {name: outcome.curve(name, budget, measure) for name in names} for budget in study.budgets}
    every = [curve for each in curves.values() for curve in each.values()]
    # Every value fits, and as much of the intervals as leaves the rest readable.
    highest = max([chance, *(value for curve in every for row in curve.values for value in row)])
    ends = [end for curve in every for end in curve.means + curve.half_widths]
    top = 1.06 * min(np.nanmax([highest, *ends]), 1.3 * highest) or 0.01
    unit = measure.rpartition(": ")[2]
    return [pairs_chart(f"equal {budget}", unit, each, study.pairs, chance, top) for budget, each in curves.items()]
