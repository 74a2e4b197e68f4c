"""Which pictures a comparison shows, and what they say in words."""

import re
from collections.abc import Sequence

import numpy as np

from declip.comparison.ablation import Ladder, baseline_of, difference, main_arms, seed_values
from declip.comparison.outcome import Outcome
from declip.io.text import percent
from declip.reports.comparison_charts import Curves, Dot, Dots, Line, Panel, Picture

MOST = 6
"""Arms in a figure; `plots.COLOURS` has as many."""


def curve_pictures(outcome: Outcome, measure: str, number: int, chance: float) -> list[Picture]:
    """The data-efficiency curves of a measure, at most `MOST` arms in a picture, the baseline in each.

    Args:
        outcome: What was measured.
        measure: One of its measures.
        number: Of the measure, for the file's name.
        chance: Of the measure, a share.
    """
    baseline = baseline_of(outcome.study)
    others = [arm for arm in main_arms(outcome.study) if arm != baseline]
    parts = [others[start : start + MOST - 1] for start in range(0, max(len(others), 1), MOST - 1)]
    pictures = []
    for part, arms in enumerate(parts):
        lines = {budget: _lines(outcome, measure, budget, [baseline, *arms]) for budget in outcome.study.budgets}
        if not any(lines.values()):
            continue
        top = _top([line for each in lines.values() for line in each], 100 * chance)
        panels = tuple(
            Curves(f"equal {budget}", measure.rpartition(": ")[2], tuple(each), outcome.study.pairs, 100 * chance, top)
            for budget, each in lines.items()
            if each
        )
        name = f"curves-{number + 1}-{_slug(measure)}" + (f"-{part + 1}" if len(parts) > 1 else "")
        pictures.append(Picture(name, _caption(measure, panels), panels))
    return pictures


def ladder_picture(outcome: Outcome, ladder: Ladder, measure: str, pairs: int) -> Picture:
    """The parts of a recipe at one number of pairs, and what was published where the rungs are the paper's."""
    panels: list[Panel] = [_dots(outcome, ladder, measure, budget, pairs) for budget in outcome.study.budgets]
    if ladder.published:
        rows = (
            Dot("terms added"),
            *(
                Dot(_broken(part.label), value, place=1, beside=f"{value:.1f}")
                for part, value in zip(ladder.rungs, ladder.published, strict=True)
            ),
        )
        panels.append(Dots("published (CC3M, ImageNet)", rows, ladder.published[-1]))
    caption = (
        f"{measure} with {pairs:,} pairs. Large: mean over the seeds, with its 95 % interval; small: each seed; "
        f"dotted: {ladder.whole}, the whole; at the right: the difference to it in points, paired over the seeds."
    )
    return Picture(f"ladder-{pairs}", caption, tuple(panels))


def _dots(outcome: Outcome, ladder: Ladder, measure: str, budget: str, pairs: int) -> Dots:
    rows: list[Dot] = []
    for heading, parts in ladder.groups:
        rows.append(Dot(heading))
        for part in parts:
            curve = outcome.curve(part.arm, budget, measure)
            place = 0 if part.arm == ladder.whole else 1
            if pairs not in curve.pairs:
                rows.append(Dot(_broken(part.label), place=place, beside="not yet"))
                continue
            at = curve.pairs.index(pairs)
            values = tuple(100 * value for value in curve.values[at])
            low, high = (100 * curve.intervals()[at]).tolist() if len(values) > 1 else (None, None)
            mean = float(100 * curve.means[at])
            rows.append(
                Dot(
                    _broken(part.label),
                    mean,
                    low,
                    high,
                    values,
                    _beside(outcome, ladder, part.arm, budget, pairs, measure),
                    place,
                )
            )
    whole = seed_values(outcome, ladder.whole, budget, pairs, measure)
    return Dots(
        f"equal {budget}", tuple(rows), 100 * float(np.mean(list(whole.values()))) if whole else None, "− whole"
    )


def _beside(outcome: Outcome, ladder: Ladder, arm: str, budget: str, pairs: int, measure: str) -> str:
    if arm == ladder.whole:
        return ""
    found = difference(outcome, arm, ladder.whole, budget, pairs, measure)
    if found is None:
        return ""
    half = "" if found.high is None else f" ± {100 * (found.high - found.mean):.1f}"
    return f"{100 * found.mean:+.1f}{half}".replace("-", "−")


def _lines(outcome: Outcome, measure: str, budget: str, arms: Sequence[str]) -> list[Line]:
    found = []
    for place, arm in enumerate(arms):
        curve = outcome.curve(arm, budget, measure)
        if curve.pairs:
            alone = np.array([[len(values) < 2] * 2 for values in curve.values])
            intervals = np.where(alone, np.nan, 100 * curve.intervals())
            values = tuple(tuple(100 * value for value in each) for each in curve.values)
            found.append(Line(arm, place, curve.pairs, 100 * curve.means, intervals, values))
    return found


def _top(lines: Sequence[Line], chance: float) -> float:
    """Every value fits, and as much of the intervals as leaves the rest readable."""
    highest = max(chance, *(value for line in lines for values in line.values for value in values))
    ends = [end for line in lines for end in line.intervals[:, 1] if not np.isnan(end)]
    return float(min(max([highest, *ends]), 1.3 * highest) * 1.06) or 1.0


def _caption(measure: str, panels: Sequence[Curves]) -> str:
    """What the arms reach with the fewest and the most pairs."""
    told = []
    for panel in panels:
        for pairs in dict.fromkeys((panel.pairs[-1], panel.pairs[0])):
            found = {line.name: line.means[line.pairs.index(pairs)] for line in panel.lines if pairs in line.pairs}
            ranked = sorted(found.items(), key=lambda item: -item[1])
            if ranked:
                names = ", ".join(f"{name} {percent(value / 100)}" for name, value in ranked)
                told.append(f"At {panel.title} with {pairs:,} pairs: {names}.")
    return f"{measure}. {' '.join(told)} Chance is {percent(panels[0].chance / 100)}."


def _broken(label: str) -> str:
    return label.replace(" +", "\n+").replace(" = ", "\n= ")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]
