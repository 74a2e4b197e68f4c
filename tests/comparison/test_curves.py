"""The data-efficiency factor on curves whose answer is known."""

from math import sqrt

import numpy as np
import pytest

from declip.comparison.statistics import Curve, curve_of, factor, pairs_needed

PAIRS = (1000, 2000, 4000, 8000)


def _curve(values: list[float], spread: float = 0.0, pairs: tuple[int, ...] = PAIRS) -> Curve:
    return Curve(pairs, tuple((value - spread, value, value + spread) for value in values))


def test_a_curve_shifted_by_log_pairs_gives_its_shift() -> None:
    # Accuracy 0.1 per doubling; A reaches with n what B reaches with 2n.
    a, b = _curve([0.2, 0.3, 0.4, 0.5]), _curve([0.1, 0.2, 0.3, 0.4])
    found = factor(a, b)
    assert [one.outside for one in found.at] == ["below", "", "", ""]
    assert [one.factor for one in found.at[1:]] == pytest.approx([2, 2, 2])
    assert found.mean == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((2, 2))


def test_the_other_way_it_is_the_inverse_and_nothing_is_extrapolated() -> None:
    a, b = _curve([0.1, 0.2, 0.3, 0.4]), _curve([0.2, 0.3, 0.4, 0.5])
    found = factor(a, b)
    assert found.at[-1].needed is None
    assert found.at[-1].outside == "above"
    assert found.mean == pytest.approx(0.5)


def test_between_two_sizes_it_is_linear_in_log_pairs() -> None:
    assert pairs_needed(PAIRS, np.array([0.1, 0.2, 0.3, 0.4]), 0.25) == (pytest.approx(2000 * sqrt(2)), "")
    assert pairs_needed(PAIRS, np.array([0.1, 0.2, 0.3, 0.4]), 0.2) == (pytest.approx(2000), "")
    assert pairs_needed(PAIRS, np.array([0.1, 0.2, 0.3, 0.4]), 0.4) == (pytest.approx(8000), "")
    assert pairs_needed(PAIRS, np.array([0.1, 0.2, 0.3, 0.4]), 0.1) == (pytest.approx(1000), "")


def test_outside_what_was_measured_there_is_no_number() -> None:
    assert pairs_needed(PAIRS, np.array([0.1, 0.2, 0.3, 0.4]), 0.09) == (None, "below")
    assert pairs_needed(PAIRS, np.array([0.1, 0.2, 0.3, 0.4]), 0.41) == (None, "above")


def test_a_dip_is_made_monotone_by_isotonic_regression() -> None:
    # 0.3 and 0.2 pool to 0.25; the level part counts from its fewest pairs.
    needed, outside = pairs_needed(PAIRS, np.array([0.1, 0.3, 0.2, 0.4]), 0.25)
    assert (needed, outside) == (pytest.approx(2000), "")


def test_nothing_in_common_gives_no_mean() -> None:
    found = factor(_curve([0.6, 0.7, 0.8, 0.9]), _curve([0.1, 0.2, 0.3, 0.4]))
    assert found.mean is None
    assert found.undefined == 1.0
    assert {one.outside for one in found.at} == {"below"}


def test_the_interval_grows_with_the_spread_over_seeds_and_needs_two() -> None:
    b = _curve([0.1, 0.2, 0.3, 0.4])
    narrow = factor(_curve([0.2, 0.3, 0.4, 0.5], 0.01), b)
    wide = factor(_curve([0.2, 0.3, 0.4, 0.5], 0.05), b)
    assert narrow.low is not None
    assert narrow.high is not None
    assert wide.low is not None
    assert wide.high is not None
    assert wide.low < narrow.low < 2 < narrow.high < wide.high
    one = Curve(PAIRS, ((0.2,), (0.3,), (0.4,), (0.5,)))
    assert factor(one, b).low is None
    assert factor(one, b).mean == pytest.approx(2)


def test_the_bootstrap_is_the_same_every_time() -> None:
    a, b = _curve([0.2, 0.3, 0.4, 0.5], 0.03), _curve([0.1, 0.2, 0.3, 0.4], 0.03)
    assert factor(a, b) == factor(a, b)


def test_the_bootstrap_agrees_with_all_draws_enumerated() -> None:
    # One size where B's value moves A's answer: three seeds give 27 equally likely draws.
    from itertools import product

    a = Curve((100, 10_000), ((0.0, 0.0), (1.0, 1.0)))
    b = Curve((1000,), ((0.2, 0.5, 0.8),))
    means = [np.mean(draw) for draw in product((0.2, 0.5, 0.8), repeat=3)]
    factors = np.sort([1000 / 100 ** (1 + mean) for mean in means])
    found = factor(a, b, resamples=20_000)
    assert found.mean == pytest.approx(1000 / 100**1.5)
    assert found.low == pytest.approx(factors[0], rel=0.01)
    assert found.high == pytest.approx(factors[-1], rel=0.01)


def test_intervals_are_student_t() -> None:
    # Mean 2, standard deviation 1, n = 3: half width t(0.975, 2) / sqrt(3) = 4.30265 / 1.73205.
    curve = Curve((10,), ((1.0, 2.0, 3.0),))
    assert curve.intervals()[0] == pytest.approx([2 - 2.48414, 2 + 2.48414], abs=1e-4)
    assert Curve((10,), ((1.0,),)).intervals()[0] == pytest.approx([1.0, 1.0])


def test_a_size_without_values_is_left_out() -> None:
    assert curve_of({4: [0.2], 2: [], 1: [0.1]}) == Curve((1, 4), ((0.1,), (0.2,)))
