"""How the recall grows with the pairs, and its intervals."""

import numpy as np
import pytest
import torch
from scipy.stats import t

from declip.models.closed_form import Pairs
from declip.reports.charts import growth_chart
from declip.training.growth import growth
from declip.training.heads import WIDER, choose_heads, jackknife
from pair_features import pairs_of


def test_the_jackknife_of_equal_groups_is_the_interval_of_a_mean():
    values = np.random.default_rng(0).random(30)
    without = (values.sum() - values) / 29
    half = WIDER * t.ppf(0.975, 29) * values.std(ddof=1) / 30**0.5
    assert jackknife(without, np.full((30, 2), 4)) == pytest.approx(half)


def test_a_few_large_groups_widen_the_interval():
    pairs = pairs_of(200, noise=1.0)
    outcome = choose_heads(pairs, np.arange(200)).outcome
    even, uneven = np.arange(200) // 2, np.minimum(np.arange(200), 100)  # 100 groups of 2; 100 of 1 and one of 100
    widths = [(found := outcome.recall(1, groups)).high - found.low for groups in (even, uneven)]
    assert widths[1] > 1.15 * widths[0]


def curves(pairs, groups):
    choice = choose_heads(pairs, groups)
    return choice, *growth(choice, len(groups))


def test_a_rising_curve_is_continued():
    pairs, groups = pairs_of(600, v=100, w=80, noise=3.0), np.arange(600)
    choice, images, found = curves(pairs, groups)
    assert images == [75, 150, 300, 600]
    assert found[1].measured[-1] == choice.outcome.recall(1, groups)
    facts = {str(k): each.to_dict() for k, each in found.items()}
    chart = growth_chart({"pairs": [*images, 1200, 2400, 4800], **facts})
    for curve in found.values():
        assert not curve.reason
        values = [each.value for each in (*curve.measured, *curve.expected)]
        assert values == sorted(values)
        widths = [each.high - each.low for each in curve.expected]
        assert widths == sorted(widths)
    assert "expected" in chart.words


def test_parts_keep_groups_together():
    _, images, _ = curves(pairs_of(320), np.arange(320) // 4)
    assert images == [40, 80, 160, 320]


def test_a_curve_that_does_not_rise_is_not_continued():
    noise = torch.randn(200, 12, generator=torch.Generator().manual_seed(1))
    unrelated = Pairs(noise, noise.roll(1, 0).flip(1), torch.arange(200))
    for pairs, reason in ((unrelated, "flat"), (pairs_of(200, noise=0.01), "cannot rise")):
        curve = curves(pairs, np.arange(200))[2][10]
        assert not curve.expected
        assert reason in curve.reason
    one_large_group = np.maximum(np.arange(200) - 100, 0)
    assert curves(pairs_of(200), one_large_group)[1:] == ([], {})
