"""Data-efficiency: how many times fewer pairs one recipe needs to reach what another reaches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log

import numpy as np
from scipy import stats
from scipy.optimize import isotonic_regression

RESAMPLES = 2000


@dataclass(frozen=True)
class Curve:
    """A measure against the number of distinct pairs.

    Attributes:
        pairs: (k,) rising.
        values: Of each number of pairs, a value for each seed.
    """

    pairs: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]

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
        low, high: Percentiles 2.5 and 97.5 of `mean` over the bootstrap; None without at least two seeds.
        undefined: Share of the bootstrap's resamples in which no factor was within what A measured.
    """

    at: tuple[FactorAt, ...]
    mean: float | None
    low: float | None = None
    high: float | None = None
    undefined: float = 0.0


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


def factor(a: Curve, b: Curve, *, resamples: int = RESAMPLES, seed: int = 0) -> Factor:
    """How many times fewer pairs A needs than B for the same value.

    The interval is a bootstrap over seeds: at every number of pairs of each recipe the seeds are drawn anew with
    replacement, and the mean factor is computed again. With three seeds it has few distinct draws, so read it as rough.

    Args:
        a: The recipe that should need fewer.
        b: The recipe that sets the values to reach.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    at = _factors(a.pairs, a.means, b.pairs, b.means)
    mean = _mean(at)
    if min(len(values) for values in (*a.values, *b.values)) < 2:
        return Factor(at, mean)
    generator = np.random.default_rng(seed)
    drawn = [
        _mean(_factors(a.pairs, _resampled(a, generator), b.pairs, _resampled(b, generator))) for _ in range(resamples)
    ]
    defined = [value for value in drawn if value is not None]
    undefined = 1 - len(defined) / resamples
    if mean is None or not defined:
        return Factor(at, mean, undefined=undefined)
    low, high = np.exp(np.percentile(np.log(defined), (2.5, 97.5)))
    return Factor(at, mean, float(low), float(high), undefined)


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


def _resampled(curve: Curve, generator: np.random.Generator) -> np.ndarray:
    return np.array([np.mean(generator.choice(values, len(values))) for values in curve.values])


def curve_of(rows: Mapping[int, Sequence[float]]) -> Curve:
    """A curve of values by number of pairs; a number without values is left out."""
    kept = sorted(pairs for pairs, values in rows.items() if len(values))
    return Curve(tuple(kept), tuple(tuple(rows[pairs]) for pairs in kept))
