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
from scipy.optimize import isotonic_regression
from scipy.special import stdtrit

from declip.comparison.study import Study, Trial, read_study
from declip.errors import UserError
from declip.evaluation.results import Measure, Result, ZeroShotResult, read_result

RUNS = "runs"
RESULT = "result.json"
FAILURE = "failure.txt"


def folder_of(folder: Path, trial: Trial) -> Path:
    """The run folder of a trial."""
    return folder / RUNS / trial.id


def t_half_width(values: Sequence[float] | np.ndarray) -> float:
    """Half the width of the mean's 95 % interval by Student's t; NaN for one value."""
    n = len(values)
    if n < 2:
        return nan
    quantile = stdtrit(n - 1, 0.975)
    spread = quantile * np.std(values, ddof=1)
    return float(spread / n**0.5)


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
        if self.needed is None:
            return None
        return self.pairs / self.needed


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
        if self.low is None or self.high is None:
            return False
        return not self.low <= 1 <= self.high


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
    before = above - 1
    rise = rising[above] - rising[before]
    step = logs[above] - logs[before]
    fraction = (value - rising[before]) / rise
    return exp(logs[before] + fraction * step), ""


def _rising(means: np.ndarray) -> np.ndarray:
    return isotonic_regression(np.asarray(means, dtype=np.float64)).x


def factor(a: EfficiencyCurve, b: EfficiencyCurve) -> Factor:
    """Compute how many times fewer pairs A needs than B for the same value.

    The interval is Student's t over each seed's log factor, see `_seed_logs`. It needs at least two seeds, the same
    ones at every number of pairs of both.
    """
    values = _rising(b.means).tolist()
    at = tuple(
        FactorAt(pairs, value, *pairs_needed(a.pairs, a.means, value))
        for pairs, value in zip(b.pairs, values, strict=True)
    )
    overlapping = intervals_overlap(a, b)
    inside = [log(one.factor) for one in at if one.factor is not None]
    if not inside:
        return Factor(at, None, overlapping=overlapping)
    mean = sum(inside) / len(inside)
    logs = _seed_logs(a, b, at)
    if logs is None:
        return Factor(at, exp(mean), overlapping=overlapping)
    half = t_half_width(logs)
    ends = np.clip((mean - half, mean + half), -99, 99)
    low, high = np.exp(ends).tolist()
    return Factor(at, exp(mean), low, high, overlapping)


def intervals_overlap(a: EfficiencyCurve, b: EfficiencyCurve) -> bool:
    """Whether the 95 % intervals of two curves overlap at every number of pairs of both; False without intervals."""
    _, of_a, of_b = np.intersect1d(a.pairs, b.pairs, return_indices=True)
    distances = abs(a.means[of_a] - b.means[of_b])
    reach = a.half_widths[of_a] + b.half_widths[of_b]
    close = distances <= reach
    return bool(len(close)) and bool(close.all())


def _seed_logs(a: EfficiencyCurve, b: EfficiencyCurve, at: Sequence[FactorAt]) -> np.ndarray | None:
    """(seeds,) log factor of each seed, with the factor's mean; None if seeds are not paired or fewer than two."""
    paired = len({*a.seeds, *b.seeds}) == 1
    if not paired or len(a.seeds[0]) < 2 or len(a.pairs) < 2:
        return None
    logs = np.log(a.pairs)
    rising = _rising(a.means)
    values_a = _pool(a)
    start = int(np.searchsorted(rising, rising[0], side="right"))  # the first above the lowest
    rows = []
    for one, values in zip(at, _pool(b), strict=True):
        if one.factor is None:
            continue
        value = min(one.value, float(rising[-1]))
        above = max(start, int(np.searchsorted(rising, value)))
        if above == len(rising):
            return None
        before = above - 1
        step = logs[above] - logs[before]
        rise = rising[above] - rising[before]
        fraction = (value - rising[before]) / rise
        there = (1 - fraction) * values_a[before] + fraction * values_a[above]  # (seeds,)
        # To first order, so that it exists where the curve of one seed does not reach the value:
        # the log factor of the means, plus the distance of the seed's two curves over the slope of A's mean curve.
        rows.append(log(one.factor) + (there - values) * step / rise)
    if rows:
        return np.mean(rows, axis=0)
    return None


def _pool(curve: EfficiencyCurve) -> np.ndarray:
    """(k, seeds) values; numbers of pairs that isotonic regression pools have their common mean."""
    values = np.array(curve.values)
    rising = _rising(curve.means)
    return np.array([values[rising == level].mean(axis=0) for level in rising])


def curve_of(rows: Mapping[int, Mapping[int, float]]) -> EfficiencyCurve:
    """Build a curve from values by number of pairs and seed."""
    numbers = sorted(rows)
    seeds = []
    values = []
    for pairs in numbers:
        of_seeds = sorted(rows[pairs].items())
        seeds.append(tuple(seed for seed, _ in of_seeds))
        values.append(tuple(value for _, value in of_seeds))
    return EfficiencyCurve(tuple(numbers), tuple(values), tuple(seeds))


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
        facts = dict[str, Result]()
        for of_trial in self.results.values():
            for measure, result in of_trial.items():
                facts.setdefault(measure, result)
        return facts

    def curves(self) -> dict[str, dict[str, EfficiencyCurve]]:
        """The curves by measure and variant; unfinished trials leave gaps, which a curve skips."""
        curves = dict[str, dict[str, EfficiencyCurve]]()
        for measure, variant in product(self.facts, self.study.names):
            values = dict[int, dict[int, float]]()
            for trial in self.study.trials():
                result = self.results.get(trial.id, {}).get(measure)
                if trial.variant == variant and result is not None:
                    values.setdefault(trial.pairs, {})[trial.seed] = result.headline.value
            curves.setdefault(measure, {})[variant] = curve_of(values)
        return curves


def by_measure(rows: Iterable[Mapping[str, Any]]) -> dict[str, Result]:
    """The result of each dataset and task, by the name of what is compared: top-1, or R@1 in both directions."""
    results = dict[str, Result]()
    for row in rows:
        result = read_result(row)
        if result is not None:
            kind = ""
            if isinstance(result, ZeroShotResult):
                kind = "zero-shot "
            results[f"{result.dataset}: {kind}{result.headline.name}"] = result
    return results


def compared_factors(study: Study, curves: Curves) -> dict[str, Factor | None]:
    """The factor of each other variant over the baseline, by name; None before both were measured."""
    baseline = curves[study.baseline]
    factors = dict[str, Factor | None]()
    for name in study.names:
        if name != study.baseline:
            measured = curves[name].pairs and baseline.pairs
            factors[name] = factor(curves[name], baseline) if measured else None
    return factors


def near_chance(curve: EfficiencyCurve, facts: Measure) -> list[int]:
    """The numbers of pairs at which a curve is within two standard errors of chance."""
    deviation = sqrt(facts.chance * (1 - facts.chance) / facts.n)
    limit = facts.chance + 2 * deviation
    return [pairs for pairs, mean in zip(curve.pairs, curve.means, strict=True) if mean <= limit]


def read_outcome(folder: Path) -> Outcome:
    """Read the finished trials of a comparison; raises `UserError` if the folder has no comparison."""
    # Every trial has its own files, so that processes may still be writing others.
    study = read_study(folder)
    if study is None:
        raise UserError(
            f"'{folder}' has no comparison. Run one with `declip compare RECIPE… --out {folder}`."
        )
    rows = dict[str, Any]()
    failures = dict[str, str]()
    for trial in study.trials():
        run_folder = folder_of(folder, trial)
        result = run_folder / RESULT
        failure = run_folder / FAILURE
        if result.is_file():
            rows[trial.id] = json.loads(result.read_text(encoding="utf-8"))
        if failure.is_file():
            failures[trial.id] = failure.read_text(encoding="utf-8")
    return Outcome(study, rows, failures)
