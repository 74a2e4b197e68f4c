"""Data efficiency: how many times fewer pairs one recipe needs to reach the scores of another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from scipy.special import stdtrit


def t_half_width(values: Sequence[float] | np.ndarray) -> float | None:
    """Half the width of the mean's 95 % interval by Student's t; None for one value."""
    n = len(values)
    return None if n < 2 else float(stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / n**0.5)


@dataclass(frozen=True)
class EfficiencyCurve:
    """A measure against the number of distinct pairs: a value for each seed of each number of pairs."""

    pairs: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    seeds: tuple[tuple[int, ...], ...] = ()  # by default numbered from 0

    @property
    def means(self) -> np.ndarray:
        """(k,) mean over the seeds."""
        return np.array([np.mean(values) for values in self.values])

    @property
    def half_widths(self) -> np.ndarray:
        """(k,) half the width of each mean's 95 % interval; NaN for one seed."""
        widths = [t_half_width(values) for values in self.values]
        return np.array([np.nan if width is None else width for width in widths])


@dataclass(frozen=True)
class FactorAt:
    """The factor at one of B's numbers of pairs, where the monotone curve of B has `value`."""

    pairs: int
    value: float
    needed: float | None  # interpolated number of pairs of A for the same value; None outside of the curve of A
    outside: str = ""  # "below" if A exceeds it with its fewest pairs, "above" if A never reaches it

    @property
    def factor(self) -> float | None:
        """B's pairs over A's."""
        return None if self.needed is None else self.pairs / self.needed


@dataclass(frozen=True)
class Factor:
    """The data-efficiency factor of a recipe A over a recipe B, at each of B's numbers of pairs and on average."""

    at: tuple[FactorAt, ...]
    mean: float | None  # geometric mean over those within the curve of A; None if there are none
    low: float | None = None  # 95 % interval of `mean` by Student's t over paired seeds; None without at least two
    high: float | None = None

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
    if value > rising[-1]:
        return None, "above"
    level = rising == value
    # On a level part: the geometric mean of its pairs.
    if level.any():
        return exp(logs[level].mean()), ""
    place = int(np.searchsorted(rising, value))
    fraction = (value - rising[place - 1]) / (rising[place] - rising[place - 1])
    return exp(logs[place - 1] + fraction * (logs[place] - logs[place - 1])), ""


def _rising(means: np.ndarray) -> np.ndarray:
    from scipy.optimize import isotonic_regression  # half a second of imports, which training does not need

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
    inside = [log(one.factor) for one in at if one.factor is not None]
    if not inside:
        return Factor(at, None)
    mean, logs = sum(inside) / len(inside), _seed_logs(a, b, at)
    half = None if logs is None else t_half_width(logs)
    if half is None:
        return Factor(at, exp(mean))
    low, high = np.exp(np.clip((mean - half, mean + half), -99, 99))
    return Factor(at, exp(mean), float(low), float(high))


def _seed_logs(a: EfficiencyCurve, b: EfficiencyCurve, at: Sequence[FactorAt]) -> np.ndarray | None:
    """(seeds,) log factor of each seed, None if the seeds are not paired.

    To first order, so that it exists for every seed where the factor exists, even if the curve of that seed alone does
    not reach the value. Its mean over the seeds is the log of the factor.
    """
    numbered = (curve.seeds or tuple(tuple(range(len(values))) for values in curve.values) for curve in (a, b))
    seeds = {of_size for curve in numbered for of_size in curve}
    if len(seeds) != 1 or len(next(iter(seeds))) < 2 or len(a.pairs) < 2:
        return None
    logs, rising, values_a = np.log(a.pairs), _rising(a.means), _pooled(a)
    start = int(np.searchsorted(rising, rising[0], side="right"))  # the first above the lowest
    rows = []
    for one, values in zip(at, _pooled(b), strict=True):
        if one.factor is None:
            continue
        place = max(start, int(np.searchsorted(rising, one.value)))
        if place == len(rising):
            return None
        step, rise = logs[place] - logs[place - 1], rising[place] - rising[place - 1]
        fraction = (one.value - rising[place - 1]) / rise
        there = (1 - fraction) * values_a[place - 1] + fraction * values_a[place]  # (seeds,)
        # The log factor of the means, plus the distance of the seed's two curves over the slope of A's mean curve.
        rows.append(log(one.factor) + (there - values) * step / rise)
    return np.mean(rows, axis=0) if rows else None


def _pooled(curve: EfficiencyCurve) -> np.ndarray:
    """(k, seeds) values; numbers of pairs that isotonic regression pools have their common mean."""
    values, rising = np.array(curve.values), _rising(curve.means)
    return np.array([values[rising == level].mean(axis=0) for level in rising])


def curve_of(rows: Mapping[int, Mapping[int, float]]) -> EfficiencyCurve:
    """Build a curve from values by number of pairs and seed, without numbers that have no values."""
    measured = {pairs: dict(sorted(rows[pairs].items())) for pairs in sorted(rows) if rows[pairs]}
    return EfficiencyCurve(
        tuple(measured),
        tuple(tuple(values.values()) for values in measured.values()),
        tuple(tuple(values) for values in measured.values()),
    )
