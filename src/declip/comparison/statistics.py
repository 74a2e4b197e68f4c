"""Data-efficiency: how many times fewer pairs one recipe needs to reach what another reaches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from scipy import stats
from scipy.optimize import isotonic_regression


@dataclass(frozen=True)
class Curve:
    """A measure against the number of distinct pairs.

    Attributes:
        pairs: (k,) rising.
        values: Of each number of pairs, a value for each seed.
        seeds: Of each number of pairs, the values' seeds; empty: they are numbered.
    """

    pairs: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    seeds: tuple[tuple[int, ...], ...] = ()

    @property
    def means(self) -> np.ndarray:
        """(k,) mean over the seeds."""
        return np.array([np.mean(values) for values in self.values])

    def intervals(self, confidence: float = 0.95) -> np.ndarray:
        """(k, 2) interval of the mean by Student's t over the seeds; without width where there is one seed."""
        found = []
        for values in self.values:
            n, mean = len(values), float(np.mean(values))
            half = stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / n**0.5 if n > 1 else 0.0
            found.append((mean - half, mean + half))
        return np.array(found)


@dataclass(frozen=True)
class FactorAt:
    """The factor at one number of the slower recipe's pairs.

    Attributes:
        pairs: How many pairs B learnt from.
        value: B's mean there.
        needed: How many pairs A needs to reach it, interpolated; None outside what A measured.
        outside: "below" when even A's fewest pairs reach more, "above" when A never reaches it, else "".
    """

    pairs: int
    value: float
    needed: float | None
    outside: str = ""

    @property
    def factor(self) -> float | None:
        """B's pairs over A's."""
        return None if self.needed is None else self.pairs / self.needed


@dataclass(frozen=True)
class Factor:
    """The data-efficiency factor of a recipe A over a recipe B.

    Attributes:
        at: The factor at each of B's numbers of pairs.
        mean: Geometric mean of those that lie within what A measured; None when none does.
        low, high: 95 % interval of `mean` by Student's t over paired seeds; None without at least two.
    """

    at: tuple[FactorAt, ...]
    mean: float | None
    low: float | None = None
    high: float | None = None


def pairs_needed(pairs: Sequence[int], means: np.ndarray, value: float) -> tuple[float | None, str]:
    """The number of pairs at which a curve reaches a value.

    The curve is made monotone (isotonic regression, least squares) and is linear in log(pairs) between what was
    measured; on a level part the fewest pairs count. It is never extrapolated.

    Args:
        pairs: (k,) rising.
        means: (k,) the measure.
        value: What is to be reached.

    Returns:
        The pairs and "", or None and "below" (all of the curve is above the value) or "above" (none of it is).
    """
    logs = np.log(np.asarray(pairs, dtype=np.float64))
    rising = isotonic_regression(np.asarray(means, dtype=np.float64)).x
    if value < rising[0]:
        return None, "below"
    if value > rising[-1]:
        return None, "above"
    place = int(np.searchsorted(rising, value, side="left"))
    if rising[place] == value or place == 0:
        return float(pairs[place]), ""
    share = (value - rising[place - 1]) / (rising[place] - rising[place - 1])
    return exp(logs[place - 1] + share * (logs[place] - logs[place - 1])), ""


def factor(a: Curve, b: Curve, confidence: float = 0.95) -> Factor:
    """How many times fewer pairs A needs than B for the same value.

    The interval is Student's t over each seed's log factor, see `_seed_logs`. It needs at least two seeds, the same
    ones at every number of pairs of both.

    Args:
        a: The recipe that should need fewer.
        b: The recipe that sets the values to reach.
        confidence: Of the interval.
    """
    at = _factors(a.pairs, a.means, b.pairs, b.means)
    mean, logs = _mean(at), _seed_logs(a, b, at)
    if mean is None or logs is None:
        return Factor(at, mean)
    half = stats.t.ppf((1 + confidence) / 2, len(logs) - 1) * np.std(logs, ddof=1) / len(logs) ** 0.5
    low, high = np.exp(np.clip((log(mean) - half, log(mean) + half), -99, 99))
    return Factor(at, mean, float(low), float(high))


def _seed_logs(a: Curve, b: Curve, at: Sequence[FactorAt]) -> np.ndarray | None:
    """(seeds,) each seed's log factor, None where the seeds are not paired.

    To first order: the log factor of the means, and beside it how far the seed's two curves are from each other there,
    over the slope of A's mean curve. So it exists for every seed wherever the factor does, although the curve of one
    seed alone may not reach, and its mean over the seeds is the factor's log.
    """
    numbered = (curve.seeds or tuple(tuple(range(len(values))) for values in curve.values) for curve in (a, b))
    seeds = {each for curve in numbered for each in curve}
    if len(seeds) != 1 or len(next(iter(seeds))) < 2 or len(a.pairs) < 2:
        return None
    own_a, own_b, logs = np.array(a.values), np.array(b.values), np.log(a.pairs)
    rising = isotonic_regression(a.means).x
    pooled = np.array([own_a[rising == level].mean(axis=0) for level in rising])
    found = []
    for one, own in zip(at, own_b, strict=True):
        if one.needed is None or one.factor is None:
            continue
        place = max(1, int(np.searchsorted(rising, one.value, side="left")))
        step = logs[place] - logs[place - 1]
        share, slope = (log(one.needed) - logs[place - 1]) / step, (rising[place] - rising[place - 1]) / step
        if slope == 0:
            return None
        there = (1 - share) * pooled[place - 1] + share * pooled[place]
        found.append(log(one.factor) + (there - own) / slope)
    return np.mean(found, axis=0) if found else None


def _factors(
    a_pairs: Sequence[int], a_means: np.ndarray, b_pairs: Sequence[int], b_means: np.ndarray
) -> tuple[FactorAt, ...]:
    found = []
    for pairs, value in zip(b_pairs, b_means, strict=True):
        needed, outside = pairs_needed(a_pairs, a_means, float(value))
        found.append(FactorAt(pairs, float(value), needed, outside))
    return tuple(found)


def _mean(at: Sequence[FactorAt]) -> float | None:
    logs = [log(one.factor) for one in at if one.factor is not None]
    return exp(sum(logs) / len(logs)) if logs else None


def curve_of(rows: Mapping[int, Mapping[int, float]]) -> Curve:
    """A curve of values by number of pairs and seed; a number without values is left out."""
    kept = {pairs: dict(sorted(rows[pairs].items())) for pairs in sorted(rows) if rows[pairs]}
    return Curve(
        tuple(kept),
        tuple(tuple(values.values()) for values in kept.values()),
        tuple(tuple(values) for values in kept.values()),
    )
