"""The outcome of a comparison: curves over numbers of pairs, data-efficiency factors, and their intervals."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import exp, log, nan, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from declip.comparison.study import Study, Trial, read_study
from declip.errors import UserError
from declip.evaluation.results import Measure, Result, ZeroShotResult, read_result

RUNS, RESULT, FAILURE = "runs", "result.json", "failure.txt"


def folder_of(folder: Path, trial: Trial) -> Path:
    """The run folder of a trial."""
    return folder / RUNS / trial.id


def t_half_width(values: Sequence[float] | np.ndarray) -> float:
    """Half the width of the mean's 95 % interval by Student's t; NaN for one value."""
    n = len(values)
    return float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / n**0.5) if n > 1 else nan


@dataclass(frozen=True)
class EfficiencyCurve:
    """A measure against the number of distinct pairs: a value for each seed of each number of pairs."""

    pairs: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    seeds: tuple[tuple[int, ...], ...]

    @property
    def means(self) -> np.ndarray:
        """(k,) mean over the seeds."""
        return np.array([np.mean(values) for values in self.values])

    @property
    def half_widths(self) -> np.ndarray:
        """(k,) half the width of each mean's 95 % interval; NaN for one seed."""
        return np.array([t_half_width(values) for values in self.values])


@dataclass(frozen=True)
class FactorAt:
    """The factor at one of B's numbers of pairs, where the monotone curve of B has `value`."""

    pairs: int
    value: float
    # Interpolated number of pairs of A for the same value; None outside of the curve of A
    needed: float | None
    # "below" if A exceeds it with its fewest pairs, "above" if no mean of A reaches it
    outside: str = ""

    @property
    def factor(self) -> float | None:
        """B's pairs over A's."""
        return None if self.needed is None else self.pairs / self.needed


@dataclass(frozen=True)
class Factor:
    """The data-efficiency factor of a recipe A over a recipe B, at each of B's numbers of pairs and on average."""

    at: tuple[FactorAt, ...]
    mean: float | None  # geometric mean over those within the curve of A; None if there are none
    # 95 % interval of `mean` by Student's t over paired seeds; None without at least two
    low: float | None = None
    high: float | None = None
    overlapping: bool = False  # whether both have 95 % intervals of their means, which overlap at every number of pairs

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 1; False without an interval."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


def pairs_needed(pairs: Sequence[int], means: np.ndarray, value: float) -> tuple[float | None, str]:
    """Find the number of pairs at which a curve reaches a value, as `FactorAt.needed` and `outside`."""
    if not pairs:
        return None, ""
    logs = np.log(np.asarray(pairs, dtype=np.float64))
    # Monotone by isotonic regression, linear in log(pairs), never extrapolated.
    rising = _rising(means)
    if value < rising[0]:
        return None, "below"
    if value > max(means):
        return None, "above"
    value = min(value, rising[-1])  # a mean that was reached, and smoothed with lower ones
    level = rising == value
    # On a level part: the geometric mean of its pairs.
    if level.any():
        return exp(logs[level].mean()), ""
    above = int(np.searchsorted(rising, value))
    fraction = (value - rising[above - 1]) / (rising[above] - rising[above - 1])
    return exp(logs[above - 1] + fraction * (logs[above] - logs[above - 1])), ""


def _rising(means: np.ndarray) -> np.ndarray:
    from scipy.optimize import (
        isotonic_regression,
    )  # half a second of imports, which training does not need

    return isotonic_regression(np.asarray(means, dtype=np.float64)).x


def factor(a: EfficiencyCurve, b: EfficiencyCurve) -> Factor:
    """Compute how many times fewer pairs A needs than B for the same value.

    The interval is Student's t over each seed's log factor, see `_seed_logs`. It needs at least two seeds, the same
    ones at every number of pairs of both.
    """
    at = tuple(
        FactorAt(pairs, float(value), *pairs_needed(a.pairs, a.means, float(value)))
        for pairs, value in zip(b.pairs, _rising(b.means), strict=True)
    )
    overlapping = intervals_overlap(a, b)
    inside = [log(one.factor) for one in at if one.factor is not None]
    if not inside:
        return Factor(at, None, overlapping=overlapping)
    mean, logs = sum(inside) / len(inside), _seed_logs(a, b, at)
    if logs is None:
        return Factor(at, exp(mean), overlapping=overlapping)
    half = t_half_width(logs)
    low, high = np.exp(np.clip((mean - half, mean + half), -99, 99)).tolist()
    return Factor(at, exp(mean), low, high, overlapping)


def intervals_overlap(a: EfficiencyCurve, b: EfficiencyCurve) -> bool:
    """Whether the 95 % intervals of two curves overlap at every number of pairs of both; False without intervals."""
    both = [(a.pairs.index(pairs), b.pairs.index(pairs)) for pairs in a.pairs if pairs in b.pairs]
    close = [abs(a.means[i] - b.means[j]) <= a.half_widths[i] + b.half_widths[j] for i, j in both]
    return bool(close) and all(close)


def _seed_logs(a: EfficiencyCurve, b: EfficiencyCurve, at: Sequence[FactorAt]) -> np.ndarray | None:
    """(seeds,) log factor of each seed, with the factor's mean; None if seeds are not paired or fewer than two."""
    # To first order, so that it exists where the curve of one seed does not reach the value.
    seeds = {*a.seeds, *b.seeds}
    if len(seeds) != 1 or len(a.seeds[0]) < 2 or len(a.pairs) < 2:
        return None
    logs, rising, values_a = np.log(a.pairs), _rising(a.means), _pooled(a)
    start = int(np.searchsorted(rising, rising[0], side="right"))  # the first above the lowest
    rows = []
    for one, values in zip(at, _pooled(b), strict=True):
        if one.factor is None:
            continue
        value = min(one.value, float(rising[-1]))
        above = max(start, int(np.searchsorted(rising, value)))
        if above == len(rising):
            return None
        step, rise = logs[above] - logs[above - 1], rising[above] - rising[above - 1]
        fraction = (value - rising[above - 1]) / rise
        there = (1 - fraction) * values_a[above - 1] + fraction * values_a[above]  # (seeds,)
        # The log factor of the means, plus the distance of the seed's two curves over the slope of A's mean curve.
        rows.append(log(one.factor) + (there - values) * step / rise)
    return np.mean(rows, axis=0) if rows else None


def _pooled(curve: EfficiencyCurve) -> np.ndarray:
    """(k, seeds) values; numbers of pairs that isotonic regression pools have their common mean."""
    values, rising = np.array(curve.values), _rising(curve.means)
    return np.array([values[rising == level].mean(axis=0) for level in rising])


def curve_of(rows: Mapping[int, Mapping[int, float]]) -> EfficiencyCurve:
    """Build a curve from values by number of pairs and seed."""
    measured = {pairs: dict(sorted(rows[pairs].items())) for pairs in sorted(rows)}
    return EfficiencyCurve(
        tuple(measured),
        tuple(tuple(values.values()) for values in measured.values()),
        tuple(tuple(values) for values in measured.values()),
    )


Curves = Mapping[str, EfficiencyCurve]  # curves of one measure, by variant


@dataclass(frozen=True)
class Outcome:
    """The finished trials of a study, by id."""

    study: Study
    rows: Mapping[str, Mapping[str, Any]]  # results, as `runner.run_trial` writes them
    failures: Mapping[str, str] = field(default_factory=dict)  # reasons

    @property
    def complete(self) -> bool:
        """Whether every trial is finished."""
        return all(trial.id in self.rows for trial in self.study.trials())

    @cached_property
    def results(self) -> dict[str, dict[str, Result]]:
        """Results by trial and measure."""
        return {id: by_measure(row["results"]) for id, row in self.rows.items()}

    @cached_property
    def facts(self) -> dict[str, Result]:
        """The first result of each measure, the headline first, for its test set and chance level."""
        results: dict[str, Result] = {}
        for of_trial in self.results.values():
            results |= {name: result for name, result in of_trial.items() if name not in results}
        return results

    def curves(self) -> dict[str, dict[str, EfficiencyCurve]]:
        """The curves by measure and variant; unfinished trials leave gaps, which a curve skips."""
        study, curves = self.study, dict[str, dict[str, EfficiencyCurve]]()
        for measure, variant in product(self.facts, study.names):
            values: dict[int, dict[int, float]] = {}
            for pairs, seed in product(study.pairs, study.seeds):
                if result := self.results.get(Trial(variant, pairs, seed).id, {}).get(measure):
                    values.setdefault(pairs, {})[seed] = result.headline.value
            curves.setdefault(measure, {})[variant] = curve_of(values)
        return curves


def by_measure(rows: Iterable[Mapping[str, Any]]) -> dict[str, Result]:
    """The result of each dataset and task, by the name of what is compared: top-1, or R@1 in both directions."""
    results = (result for row in rows if (result := read_result(row)) is not None)
    kind = {ZeroShotResult.task: "zero-shot "}
    return {
        f"{result.dataset}: {kind.get(result.task, '')}{result.headline.name}": result
        for result in results
    }


def compared_factors(study: Study, curves: Curves) -> dict[str, Factor | None]:
    """The factor of each other variant over the baseline, by name; None before both were measured."""
    baseline = curves[study.baseline]
    others = [name for name in study.names if name != study.baseline]
    return {
        name: factor(curves[name], baseline) if curves[name].pairs and baseline.pairs else None
        for name in others
    }


def near_chance(curve: EfficiencyCurve, facts: Measure) -> list[int]:
    """The numbers of pairs at which a curve is within two standard errors of chance."""
    limit = facts.chance + 2 * sqrt(facts.chance * (1 - facts.chance) / facts.n)
    return [pairs for pairs, mean in zip(curve.pairs, curve.means, strict=True) if mean <= limit]


def read_outcome(folder: Path) -> Outcome:
    """Read the finished trials of a comparison; raises `UserError` if the folder has no comparison."""
    # Every trial has its own files, so that processes may still be writing others.
    study = read_study(folder)
    if study is None:
        raise UserError(
            f"'{folder}' has no comparison. Run one with `declip compare RECIPE… --out {folder}`."
        )

    def written(name: str) -> dict[str, str]:
        paths = {trial.id: folder_of(folder, trial) / name for trial in study.trials()}
        return {
            id: path.read_text(encoding="utf-8") for id, path in paths.items() if path.is_file()
        }

    return Outcome(
        study, {id: json.loads(text) for id, text in written(RESULT).items()}, written(FAILURE)
    )
