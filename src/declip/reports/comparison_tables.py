"""Tables of a comparison, as words: the same on the page and in Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from declip.comparison.ablation import Difference, Ladder, baseline_of, difference, seed_values
from declip.comparison.outcome import Outcome, scores, tuning_score
from declip.comparison.statistics import Factor, FactorAt
from declip.comparison.study import Study
from declip.evaluation.results import RetrievalResult, read_result
from declip.io.text import percent
from declip.reports.factor_wording import span

NONE = "–"
"""In a cell without a number."""


@dataclass(frozen=True)
class Table:
    """Words in rows.

    Attributes:
        caption: Above it.
        columns: Names.
        rows: As many words as columns.
        texts: How many of the first columns are words; the others are numbers.
        folded: Shown when asked for.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Measured:
    """What a measure is of.

    Attributes:
        n: Queries: images, or images and captions.
        chance: What guessing gets, a share.
        choices: Among how many, in words; empty when the result does not say.
    """

    n: int
    chance: float
    choices: str = ""

    def standard_error(self, share: float) -> float:
        """Of a share of n independent trials."""
        return float(np.sqrt(share * (1 - share) / self.n))


def measured(outcome: Outcome) -> dict[str, Measured]:
    """What each measure is of, in the order of the measures; by the first run that has it."""
    found: dict[str, Measured] = {}
    for row in outcome.rows.values():
        for raw in row["results"]:
            result, named = read_result(raw), list(scores([raw]))
            if result is None or not named or named[0] in found:
                continue
            if isinstance(result, RetrievalResult):
                chance = (result.text_to_image.chance1 + result.image_to_text.chance1) / 2
                choices = f"{result.images:,} images and {result.texts:,} captions"
                found[named[0]] = Measured(result.images, chance, choices)
            else:
                first = result.measures()[0]
                classes = getattr(result, "classes", None)
                found[named[0]] = Measured(first.n, first.chance, f"{classes:,} classes" if classes else "")
    return found


def measures_table(outcome: Outcome) -> Table:
    """What was measured, with n and chance."""
    rows = [
        (name, each.choices or NONE, f"{each.n:,}", percent(each.chance)) for name, each in measured(outcome).items()
    ]
    return Table("Measured after the last step of each run", ("measure", "among", "n", "chance"), tuple(rows), texts=2)


def common_overrides(study: Study) -> dict[str, Any]:
    """What all arms override alike."""
    first = study.arms[0].overrides
    return {
        key: value
        for key, value in first.items()
        if all(key in arm.overrides and arm.overrides[key] == value for arm in study.arms)
    }


def arms_table(study: Study) -> Table:
    """Each arm's recipe, and what it overrides beside what all do."""
    common = common_overrides(study)
    rows = []
    for arm in study.arms:
        own = {key: value for key, value in arm.overrides.items() if key not in common}
        rows.append((arm.name, arm.recipe, settings(own) or NONE, settings(study.chosen.get(arm.name, {})) or NONE))
    columns = ("arm", "recipe", "of its own", "chosen by tuning")
    if study.tuning is None:
        return Table("Arms", columns[:3], tuple(row[:3] for row in rows), texts=3)
    return Table("Arms", columns, tuple(rows), texts=4)


def scores_table(outcome: Outcome, measure: str, budget: str) -> Table:
    """Arm by number of pairs: the mean over the seeds, its interval, how many seeds."""
    sizes = outcome.study.pairs
    rows = []
    for arm in outcome.study.arms:
        curve = outcome.curve(arm.name, budget, measure)
        at = dict(zip(curve.pairs, zip(curve.means, curve.intervals(), curve.values, strict=True), strict=True))
        cells = []
        for pairs in sizes:
            if pairs not in at:
                cells.append(NONE)
                continue
            mean, (_, high), values = at[pairs]
            cells.append(with_interval(float(mean), float(high - mean) if len(values) > 1 else None, len(values)))
        rows.append((arm.name, *cells))
    caption = f"{measure}, equal {budget}: mean ± 95 % interval in %, seeds in brackets"
    return Table(caption, ("arm", *(f"{pairs:,} pairs" for pairs in sizes)), tuple(rows))


def factors_table(
    factors: Mapping[tuple[str, str], Factor | None], budget: str, sizes: Sequence[int], baseline: str, measure: str
) -> Table:
    """Factors by arm under a budget, in all and at each of the baseline's numbers of pairs."""
    rows = []
    for (arm, under), factor in factors.items():
        if under != budget:
            continue
        if factor is None:
            rows.append((arm, *[NONE] * (2 + len(sizes))))
            continue
        at = {each.pairs: each for each in factor.at}
        interval = NONE if factor.low is None or factor.high is None else span(factor.low, factor.high)
        mean = NONE if factor.mean is None else f"{factor.mean:.2f}"
        rows.append((arm, mean, interval, *(_factor_at(at.get(pairs)) for pairs in sizes)))
    columns = ("arm", "factor", "95 % interval", *(f"at {pairs:,}" for pairs in sizes))
    caption = f"Data-efficiency factor over {baseline} at equal {budget}, and at each number of {baseline}'s pairs"
    return Table(f"{caption}, by {measure}", columns, tuple(rows))


def _factor_at(at: FactorAt | None) -> str:
    if at is None:
        return NONE
    if at.factor is None:
        return {"below": "passed", "above": "not reached"}[at.outside]
    return f"{at.factor:.2f}"


def ladder_table(outcome: Outcome, ladder: Ladder, measure: str, pairs: int) -> Table:
    """Each part: what it reaches, and its difference to the whole, under every budget."""
    budgets = outcome.study.budgets
    published = {
        part.label: value for part, value in zip(ladder.rungs, ladder.published, strict=bool(ladder.published))
    }
    rows = []
    for heading, parts in ladder.groups:
        for part in parts:
            cells = [heading, part.label]
            for budget in budgets:
                values = list(seed_values(outcome, part.arm, budget, pairs, measure).values())
                more = (
                    None
                    if part.arm == ladder.whole
                    else difference(outcome, part.arm, ladder.whole, budget, pairs, measure)
                )
                cells += [percent(float(np.mean(values))) if values else NONE, difference_words(more)]
            if ladder.published:
                cells.append(f"{published[part.label]:.1f} %" if part in ladder.rungs else NONE)
            rows.append(tuple(cells))
    columns = ["part", "arm"]
    for budget in budgets:
        columns += [f"equal {budget}", "− whole, points"]
    if ladder.published:
        columns.append("published")
    return Table(f"Parts of {ladder.whole} with {pairs:,} pairs: {measure}", tuple(columns), tuple(rows), texts=2)


def difference_words(found: Difference | None) -> str:
    """ "−2.1 (−3.0 to −1.2)", in points."""
    if found is None:
        return NONE
    interval = "" if found.low is None or found.high is None else f" ({signed(found.low)} to {signed(found.high)})"
    return f"{signed(found.mean)}{interval}"


def signed(share: float) -> str:
    """Points with their sign; as many digits as the number can bear."""
    points = 100 * share
    return f"{points:+.{1 if abs(points) >= 1 else 2}f}".replace("-", "−")


def cost_table(study: Study) -> Table | None:
    """Seconds a step, and steps under each budget; None before the arms were timed."""
    if any(arm.name not in study.seconds for arm in study.arms):
        return None
    base = baseline_of(study)
    rows = []
    for arm in study.arms:
        seconds = study.seconds[arm.name]
        steps = [study.steps_of(arm.name, budget) for budget in study.budgets]
        rows.append(
            (
                arm.name,
                f"{seconds:.3g}",
                f"{seconds / study.seconds[base]:.2f}",
                *(f"{each:,} ({each * study.batch:,})" for each in steps),
            )
        )
    columns = ("arm", "seconds a step", f"over {base}", *(f"steps (samples), equal {each}" for each in study.budgets))
    return Table("What a step costs, and how many each arm takes", columns, tuple(rows))


def tuning_table(outcome: Outcome) -> Table | None:
    """What each arm tried, and which it kept; None without tuning."""
    study = outcome.study
    if study.tuning is None:
        return None
    rows = []
    for cell in study.tuning_cells():
        row = outcome.tuning.get(cell.id)
        chosen = study.chosen.get(cell.arm)
        mark = "chosen" if chosen is not None and dict(chosen) == dict(cell.overrides) else ""
        rows.append((cell.arm, settings(cell.overrides), mark, NONE if row is None else percent(tuning_score(row))))
    caption = f"Tries on {study.tuning.on}: {tuned_by(outcome)}"
    return Table(caption, ("arm", "values", "", "score"), tuple(rows), texts=3)


def tuned_by(outcome: Outcome) -> str:
    """The name of what tuning goes by: the measure whose value every try's score is."""
    names: list[str] = []
    for number, row in enumerate(outcome.tuning.values()):
        result = read_result(row["results"][0]) if row["results"] else None
        same = [each.name for each in result.measures() if each.value == tuning_score(row)] if result else []
        names = same if number == 0 else [name for name in names if name in same]
    return names[0] if names else "R@1, the mean of both directions"


def runs_table(outcome: Outcome) -> Table:
    """Every run that is done."""
    measures = outcome.measures
    rows = []
    for row in outcome.rows.values():
        found = scores(row["results"])
        words = (row["arm"], f"{row['pairs']:,}", str(row["seed"]), f"{row['steps']:,}", f"{row['samples']:,}")
        values = (percent(found[name]) if name in found else NONE for name in measures)
        rows.append((*words, f"{row['seconds']:,.1f}", *values))
    columns = ("arm", "pairs", "seed", "steps", "samples", "seconds", *measures)
    return Table(f"Every run ({len(rows):,})", columns, tuple(rows), folded=True)


def failures_table(outcome: Outcome) -> Table | None:
    """Which runs failed, with the last line of their reason; None when none did."""
    if not outcome.failures:
        return None
    rows = [
        (name, (reason.strip().splitlines() or ["no reason was left"])[-1]) for name, reason in outcome.failures.items()
    ]
    return Table("Runs that failed", ("run", "why"), tuple(rows), texts=2)


def with_interval(mean: float, half: float | None, seeds: int) -> str:
    """ "36.7 ± 1.2 (3)", in %, with as many decimals in the interval as in the mean."""
    value = percent(mean).removesuffix(" %")
    if half is None:
        return f"{value} ({seeds})"
    decimals = len(value.partition(".")[2])
    return f"{value} ± {100 * half:.{decimals}f} ({seeds})"


def settings(values: Mapping[str, Any]) -> str:
    """Keys and values in a line."""
    return ", ".join(f"{key}={yaml_value(value)}" for key, value in values.items())


def yaml_value(value: object) -> str:
    """A value as a word of the command line, which is read as YAML; a text is one already."""
    if isinstance(value, str):
        return value
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()
