"""The result of a comparison: numbers for the page, for Markdown and for the terminal."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Group
from rich.text import Text

from declip.comparison.ablation import Ablation, measured_sizes, read_ablation
from declip.comparison.outcome import Difference, Outcome, scores, sweep_score
from declip.comparison.runner import ROUNDS, TIMED
from declip.comparison.statistics import EfficiencyCurve, Factor, FactorAt
from declip.comparison.study import Study
from declip.evaluation.results import ClassificationResult, RetrievalResult, ZeroShotResult, read_result
from declip.io.atomic import atomic_write
from declip.io.text import percent
from declip.reports.charts import COLORS, Chart, PairsLine, PartRow, pairs_chart, parts_chart, write_png
from declip.reports.page import NONE, Table, points, render, span, unbalanced, write
from declip.reports.terminal import rich_table

PAGE, MARKDOWN, FIGURES = "report.html", "results.md", "figures"


@dataclass(frozen=True)
class MeasureFacts:
    """The test set behind a measure.

    Attributes:
        majority: Fraction of the largest class where that is clearly above chance, else None.
        among: Number of candidates, in words.
    """

    n: int
    chance: float
    majority: float | None = None
    among: str = NONE

    def standard_error(self, fraction: float) -> float:
        """Standard error of a fraction of n independent trials."""
        return float(np.sqrt(fraction * (1 - fraction) / self.n))


@dataclass(frozen=True)
class ComparedFactor:
    """The factor of a variant over the baseline under a budget; None when both have not been measured yet."""

    variant: str
    budget: str
    factor: Factor | None

    def outside(self, side: str) -> list[int]:
        """The baseline's numbers of pairs "below" or "above" the scores that the variant reached."""
        return [at.pairs for at in self.factor.at if at.outside == side] if self.factor else []

    @property
    def inside(self) -> int:
        """At how many of the baseline's numbers of pairs there is a factor."""
        return sum(at.factor is not None for at in self.factor.at) if self.factor else 0


@dataclass(frozen=True)
class Panels:
    """Charts next to each other, with the name of their image file."""

    name: str
    charts: tuple[Chart, ...]

    @property
    def svgs(self) -> list[Any]:
        """Each chart on its own, so that a narrow page can put them under each other."""
        return [chart.svg(f"{self.name}-{place}") for place, chart in enumerate(self.charts)]


def write_page(outcome: Outcome, folder: Path) -> tuple[Path, Path]:
    """Write report.html, results.md and figures/ of a comparison, complete or not.

    Returns:
        The paths of report.html and results.md.
    """
    content = context(outcome)
    with atomic_write(folder / FIGURES) as path:
        path.mkdir()
        for figure in (*content["curves"].values(), *content["parts"].values()):
            write_png(figure.charts, path / f"{figure.name}.png")
    page = write(folder / PAGE, render("comparison.html", **content))
    return page, write(folder / MARKDOWN, render("comparison.md", **content))


def context(outcome: Outcome) -> dict[str, Any]:
    """The numbers that the templates are fed."""
    study, facts = outcome.study, measure_facts(outcome)
    foremost = next(iter(facts), "")
    factors = compared_factors(outcome, foremost)
    ablation = read_ablation(study)
    sizes = measured_sizes(outcome, ablation, foremost) if ablation and foremost else []
    best = {measure: _best(outcome, measure) for measure in facts}
    rows = [*outcome.rows.values(), *outcome.sweep.values()]
    return {
        "study": study,
        "outcome": outcome,
        "trials": len(study.trials()),
        "tries": len(study.sweep_trials()),
        "facts": facts,
        "foremost": foremost,
        "headline": [each for each in factors if each.variant in study.named],
        "near_chance": {budget: near_chance(outcome, budget, foremost, facts) for budget in study.budgets},
        "errors": {measure: (best[measure], facts[measure].standard_error(best[measure])) for measure in facts},
        "ablation": ablation,
        "common": settings(common_overrides(study)),
        "commands": [shlex.join(words) for words in study.commands],
        "seconds": sum(row["seconds"] for row in rows),
        "sweep_seconds": sum(row["seconds"] for row in outcome.sweep.values()),
        "devices": sorted({row["device"] for row in rows}),
        "versions": {name: value for row in rows for name, value in row["versions"].items()},
        "timed_steps": (ROUNDS * TIMED, ROUNDS),
        "variants_table": variants_table(study),
        "measures_table": measures_table(facts),
        "failures_table": failures_table(outcome),
        "factor_tables": [factors_table(factors, budget, study) for budget in study.budgets] if factors else [],
        "score_tables": [scores_table(outcome, measure, budget) for measure in facts for budget in study.budgets],
        "cost_table": cost_table(study),
        "sweep_table": sweep_table(outcome),
        "runs_table": runs_table(outcome),
        "curves": {
            f"{measure}{part}": figure
            for number, measure in enumerate(facts)
            for part, figure in curve_figures(outcome, measure, number, facts[measure].chance).items()
        },
        "parts": {pairs: parts_figure(outcome, ablation, foremost, pairs) for pairs in sizes if ablation},
        "parts_tables": {pairs: parts_table(outcome, ablation, foremost, pairs) for pairs in sizes if ablation},
    }


def summary(outcome: Outcome) -> Group:
    """The result for the terminal: every score with its interval and n, and the factors of the first measure."""
    content = context(outcome)
    parts: list[Any] = []
    for table in (*content["score_tables"], *content["factor_tables"], content["failures_table"]):
        if table is not None:
            parts += [Text(table.caption, "bold"), rich_table(table), Text()]
    words = render("comparison.txt", **content)
    return Group(*parts, Text(words.strip()))


def measure_facts(outcome: Outcome) -> dict[str, MeasureFacts]:
    """The test set behind each measure, by the first trial that has it."""
    found: dict[str, MeasureFacts] = {}
    for row in outcome.rows.values():
        for raw in row["results"]:
            result, named = read_result(raw), next(iter(scores([raw])), None)
            if result is None or named is None or named in found:
                continue
            if isinstance(result, RetrievalResult):
                chance = (result.text_to_image.chance1 + result.image_to_text.chance1) / 2
                among = f"{result.images:,} images and {result.texts:,} captions"
                found[named] = MeasureFacts(result.images, chance, among=among)
            elif isinstance(result, ClassificationResult):
                first = result.measures()[0]
                majority = unbalanced(result) if isinstance(result, ZeroShotResult) else None
                found[named] = MeasureFacts(first.n, first.chance, majority, f"{result.classes:,} classes")
    return found


def compared_factors(outcome: Outcome, measure: str) -> list[ComparedFactor]:
    """The factor of each variant over the baseline under each budget."""
    study, baseline = outcome.study, outcome.study.baseline
    found = []
    for name in [variant.name for variant in study.variants if variant.name != baseline] if measure else []:
        for budget in study.budgets:
            both = all(outcome.curve(each, budget, measure).pairs for each in (name, baseline))
            factor = outcome.factor(name, baseline, budget, measure) if both else None
            found.append(ComparedFactor(name, budget, factor))
    return found


def near_chance(outcome: Outcome, budget: str, measure: str, facts: Mapping[str, MeasureFacts]) -> list[int]:
    """Numbers of pairs at which the baseline is within two standard errors of chance: a factor there means nothing."""
    if not measure:
        return []
    curve, fact = outcome.curve(outcome.study.baseline, budget, measure), facts[measure]
    limit = fact.chance + 2 * fact.standard_error(fact.chance)
    return [pairs for pairs, mean in zip(curve.pairs, curve.means, strict=True) if mean <= limit]


def _best(outcome: Outcome, measure: str) -> float:
    study = outcome.study
    curves = [outcome.curve(variant.name, budget, measure) for variant in study.variants for budget in study.budgets]
    return max((float(mean) for curve in curves for mean in curve.means), default=0.0)


def common_overrides(study: Study) -> dict[str, Any]:
    """Overrides that all variants have."""
    first = study.variants[0].overrides
    missing = object()
    return {k: v for k, v in first.items() if all(each.overrides.get(k, missing) == v for each in study.variants)}


def settings(values: Mapping[str, Any]) -> str:
    """Keys and values in a line, as the command reads them."""
    return ", ".join(f"{key}={_yaml(value)}" for key, value in values.items())


def _yaml(value: object) -> str:
    if isinstance(value, str):
        return value
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def variants_table(study: Study) -> Table:
    """Each variant's recipe, and what it overrides beyond the common overrides."""
    common, rows = common_overrides(study), []
    for variant in study.variants:
        own = {key: value for key, value in variant.overrides.items() if key not in common}
        row = (variant.name, variant.recipe, settings(own) or NONE)
        rows.append((*row, settings(study.chosen.get(variant.name, {})) or NONE) if study.sweep else row)
    columns = ("variant", "recipe", "overrides", *(["chosen by the sweep"] if study.sweep else []))
    return Table("Variants", columns, tuple(rows), texts=len(columns))


def measures_table(facts: Mapping[str, MeasureFacts]) -> Table:
    """Each measure with n, chance and, for unbalanced sets, the majority class."""
    unbalanced = any(each.majority for each in facts.values())
    rows = []
    for name, each in facts.items():
        row = (name, each.among, f"{each.n:,}", percent(each.chance))
        rows.append((*row, percent(each.majority) if each.majority else NONE) if unbalanced else row)
    columns = ("measure", "among", "n", "chance", *(["largest class"] if unbalanced else []))
    return Table("Measured after the last step of each run", columns, tuple(rows), texts=2)


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
    for each in factors:
        if each.budget != budget:
            continue
        factor = each.factor or Factor((), None)
        at = {one.pairs: one for one in factor.at}
        interval = NONE if factor.low is None or factor.high is None else span(factor.low, factor.high)
        mean = NONE if factor.mean is None else f"{factor.mean:.2f}"
        rows.append((each.variant, mean, interval, *(_factor_at(at.get(pairs)) for pairs in study.pairs)))
    columns = ("variant", "factor", "95 % interval", *(f"at {pairs:,}" for pairs in study.pairs))
    return Table(f"Data-efficiency factor over {study.baseline}, equal {budget}", columns, tuple(rows))


def _factor_at(at: FactorAt | None) -> str:
    if at is None:
        return NONE
    return {"below": "passed", "above": "not reached"}[at.outside] if at.factor is None else f"{at.factor:.2f}"


def parts_table(outcome: Outcome, ablation: Ablation, measure: str, pairs: int) -> Table:
    """Each part of the ablation: its score and its difference to the whole, under every budget."""
    budgets, rows = outcome.study.budgets, []
    for group, parts in ablation.groups.items():
        for part in parts:
            cells = [group, part.label]
            for budget in budgets:
                values = list(outcome.values(part.variant, budget, pairs, measure).values())
                more = outcome.difference(part.variant, ablation.whole, budget, pairs, measure)
                same = part.variant == ablation.whole
                cells += [percent(float(np.mean(values))) if values else NONE, NONE if same else _difference(more)]
            cells += [f"{part.reported:.1f} %" if part.reported else NONE] if ablation.reported else []
            rows.append(tuple(cells))
    columns = ["group", "part", *(name for budget in budgets for name in (f"equal {budget}", "− whole, points"))]
    columns += ["reported"] if ablation.reported else []
    return Table(f"Parts of {ablation.whole} with {pairs:,} pairs: {measure}", tuple(columns), tuple(rows), texts=2)


def _difference(found: Difference | None) -> str:
    """ "−2.1 (−3.0 to −1.2)", in points."""
    if found is None:
        return NONE
    interval = "" if found.low is None or found.high is None else f" ({points(found.low)} to {points(found.high)})"
    return f"{points(found.mean)}{interval}"


def cost_table(study: Study) -> Table | None:
    """Seconds a step, and steps under each budget; None before the variants were timed."""
    if any(variant.name not in study.seconds for variant in study.variants):
        return None
    rows = []
    for name in (variant.name for variant in study.variants):
        seconds, steps = study.seconds[name], [study.steps_of(name, budget) for budget in study.budgets]
        ratio = seconds / study.seconds[study.baseline]
        counts = (f"{each:,} ({each * study.batch_size:,})" for each in steps)
        rows.append((name, f"{seconds:.3g}", f"{ratio:.2f}", *counts))
    budgets = (f"steps (samples), equal {each}" for each in study.budgets)
    columns = ("variant", "seconds a step", f"over {study.baseline}", *budgets)
    return Table("Cost of a step, and number of steps", columns, tuple(rows))


def sweep_table(outcome: Outcome) -> Table | None:
    """What each variant tried, and which it kept; None without a sweep."""
    study, rows = outcome.study, []
    for trial in study.sweep_trials():
        row = outcome.sweep.get(trial.id)
        kept = dict(study.chosen.get(trial.variant, {})) == dict(trial.overrides)
        score = NONE if row is None else percent(sweep_score(row))
        rows.append((trial.variant, settings(trial.overrides), "chosen" if kept else "", score))
    if study.sweep is None:
        return None
    return Table(f"Sweep on {study.sweep.dataset}", ("variant", "values", "", "score"), tuple(rows), texts=3)


def runs_table(outcome: Outcome) -> Table:
    """Every run that is done."""
    measures, rows = outcome.measures, []
    for row in outcome.rows.values():
        found = scores(row["results"])
        words = (row["variant"], f"{row['pairs']:,}", str(row["seed"]), f"{row['steps']:,}", f"{row['samples']:,}")
        values = (percent(found[name]) if name in found else NONE for name in measures)
        rows.append((*words, f"{row['seconds']:,.1f}", *values))
    columns = ("variant", "pairs", "seed", "steps", "samples", "seconds", *measures)
    return Table(f"Every run ({len(rows):,})", columns, tuple(rows), folded=True)


def failures_table(outcome: Outcome) -> Table | None:
    """Failed runs with the last line of their reason; None when there are none."""
    rows = tuple(
        (name, (reason.strip().splitlines() or ["no reason was left"])[-1]) for name, reason in outcome.failures.items()
    )
    return Table("Runs that failed", ("run", "reason"), rows, texts=2) if rows else None


def curve_figures(outcome: Outcome, measure: str, number: int, chance: float) -> dict[str, Panels]:
    """Curves of the named variants by part, as many in a figure as there are colors, the baseline in each."""
    study, most = outcome.study, len(COLORS) - 1
    others = [name for name in study.named if name != study.baseline]
    figures = {}
    for start in range(0, max(len(others), 1), most):
        names = [study.baseline, *others[start : start + most]]
        lines = {budget: _lines(outcome, measure, budget, names) for budget in study.budgets}
        if not any(lines.values()):
            continue
        top = _top([line for each in lines.values() for line in each], 100 * chance)
        unit = measure.rpartition(": ")[2]
        charts = tuple(
            pairs_chart(f"equal {budget}", unit, each, study.pairs, 100 * chance, top)
            for budget, each in lines.items()
            if each
        )
        part = f", part {start // most + 1}" if len(others) > most else ""
        slug = re.sub(r"[^a-z0-9]+", "-", f"{measure}{part}".lower()).strip("-")[:60]
        figures[part] = Panels(f"curves-{number + 1}-{slug}", charts)
    return figures


def _lines(outcome: Outcome, measure: str, budget: str, names: Sequence[str]) -> list[PairsLine]:
    found = []
    for place, name in enumerate(names):
        curve = outcome.curve(name, budget, measure)
        if curve.pairs:
            values = tuple(tuple(100 * value for value in each) for each in curve.values)
            found.append(PairsLine(name, place, curve.pairs, 100 * curve.means, 100 * curve.half_widths, values))
    return found


def _top(lines: Sequence[PairsLine], chance: float) -> float:
    """Every value fits, and as much of the intervals as leaves the rest readable."""
    highest = max(chance, *(value for line in lines for values in line.values for value in values))
    ends = [float(end) for line in lines for end in line.means + line.half_widths if not np.isnan(end)]
    return float(min(max([highest, *ends]), 1.3 * highest) * 1.06) or 1.0


def parts_figure(outcome: Outcome, ablation: Ablation, measure: str, pairs: int) -> Panels:
    """The parts of a recipe at one number of pairs, and the reported numbers where the steps are the paper's."""
    charts = []
    for budget in outcome.study.budgets:
        rows: list[PartRow] = []
        for group, parts in ablation.groups.items():
            rows.append(PartRow(group))
            for part in parts:
                label, is_whole = part.label.replace(" +", "\n+").replace(" = ", "\n= "), part.variant == ablation.whole
                curve, place = outcome.curve(part.variant, budget, measure), 0 if is_whole else 1
                if pairs not in curve.pairs:
                    rows.append(PartRow(label, place=place, aside="not yet"))
                    continue
                at = curve.pairs.index(pairs)
                half = None if np.isnan(curve.half_widths[at]) else float(100 * curve.half_widths[at])
                values = tuple(100 * value for value in curve.values[at])
                more = outcome.difference(part.variant, ablation.whole, budget, pairs, measure)
                aside = "" if is_whole or more is None else points(more.mean)
                rows.append(PartRow(label, float(100 * curve.means[at]), half, values, aside, place))
        whole = list(outcome.values(ablation.whole, budget, pairs, measure).values())
        charts.append(parts_chart(f"equal {budget}", rows, 100 * float(np.mean(whole)) if whole else None, "− whole"))
    if ablation.reported:
        steps = [part for parts in ablation.groups.values() for part in parts if part.reported]
        rows = [PartRow(p.label.replace(" +", "\n+"), p.reported, aside=f"{p.reported:.1f}", place=1) for p in steps]
        charts.append(parts_chart("reported (CC3M, ImageNet)", [PartRow("losses added"), *rows], steps[-1].reported))
    return Panels(f"ablation-{pairs}", tuple(charts))
