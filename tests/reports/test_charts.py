"""The charts, read from their axes, and their SVG."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.collections import LineCollection

from comparison.synthetic import MEASURE, outcome, study
from declip.reports.charts import COLORS, score_chart, smoothed, value_chart
from declip.reports.comparison import curve_chart


def axes(chart):
    (ax,) = chart.figure().get_axes()
    return ax


def curves(found):
    return curve_chart(found.study, found.curves()[MEASURE], MEASURE, 0.005)


def names(ax):
    (legend,) = ax.figure.legends
    return [text.get_text().strip() for text in legend.get_texts()]


def xy(ax, name):
    handles, labels = ax.get_legend_handles_labels()
    handle = handles[[label.strip() for label in labels].index(name)]
    line = handle[0] if isinstance(handle, tuple) else handle
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def test_smoothing_takes_away_noise_keeps_the_level_and_skips_gaps():
    smooth = smoothed(2 + np.random.default_rng(0).standard_normal(600))
    assert smooth.std() < 0.25
    assert smooth.mean() == pytest.approx(2, abs=0.1)
    constant = np.where(np.arange(100) == 40, np.nan, 3.0)
    np.testing.assert_allclose(smoothed(constant), constant)


def test_a_value_over_the_steps_has_all_spikes_and_a_small_picture():
    steps = np.arange(10, 200_010, 10)
    values = np.linspace(5, 1, 20_000) + np.random.default_rng(0).normal(size=20_000)
    values[123], values[200], values[300] = 1e4, np.nan, np.inf
    chart = value_chart("total", steps, values)
    assert len(chart.svg("x")) < 40_000
    assert re.fullmatch(r"total, from .* at step 10 to .* at step 200,000\.", chart.words)
    smooth = xy(axes(chart), "total")[1]
    assert smooth[2000] > smooth[-1] + 3
    assert np.nanmax(np.asarray(axes(chart).lines[0].get_ydata())) == 1e4
    assert np.nanmax(smooth) < 7, "no spike is in the mean"
    assert value_chart("x", np.arange(2), np.full(2, np.nan)) is None
    lone = axes(value_chart("x", np.arange(1, 41), np.r_[0.5, np.full(39, np.nan)]))
    assert (lone.get_xlim(), lone.lines[-1].get_marker()) == ((1, 40), "o")


def test_scores_are_named_with_their_last_value_and_chance_is_shown():
    ax = axes(score_chart({"top-1": [0.1, 0.2], "top-5": [0.3, 0.4]}, [100, 200], 0.05))
    assert names(ax) == ["chance 5.0 %", "top-1 20.0 %", "top-5 40.0 %"]
    np.testing.assert_allclose(xy(ax, "top-1 20.0 %")[1], [10, 20])
    np.testing.assert_allclose(xy(ax, "chance 5.0 %")[1], 5)


def test_curves_show_means_intervals_seeds_and_chance():
    ax = axes(curves(outcome(study())))
    np.testing.assert_allclose(xy(ax, "clip")[1], [10, 20, 30, 40])
    np.testing.assert_allclose(xy(ax, "declip")[0], [1000, 2000, 4000, 8000], rtol=0.05)
    np.testing.assert_allclose(xy(ax, "chance")[1], 0.5)
    seeds = next(each for each in ax.lines if each.get_marker() == ".")
    np.testing.assert_allclose(sorted(np.asarray(seeds.get_ydata()))[:3], [9, 10, 11])
    bars = next(each for each in ax.collections if isinstance(each, LineCollection))
    assert np.array(bars.get_segments()[0])[:, 1] == pytest.approx(
        [10 - 2.484, 10 + 2.484], abs=1e-3
    )
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1k", "2k", "4k", "8k"]
    wide = outcome(study(seeds=(0, 1)), value=lambda trial: 0.3 + 0.05 * trial.seed)
    # The interval of two seeds reaches up to 64 %
    assert 35 < axes(curves(wide)).get_ylim()[1] < 55


def test_strange_names_are_escaped_and_svgs_take_their_colors_from_the_page_and_share_no_ids():
    plan, strange = study(), '_<b>"&$x$ long name'
    more = tuple(replace(plan.variants[1], name=f"{strange}{number}") for number in range(10))
    chart = curves(outcome(replace(plan, variants=(*plan.variants, *more))))
    ids = []
    assert names(axes(chart)) == ["chance", "clip", "declip", *(variant.name for variant in more)]
    for name in "ab":
        svg = chart.svg(name)
        assert ("<b>" in svg, '&lt;b&gt;"&amp;$x$' in svg) == (False, True)
        root = ElementTree.fromstring(svg.replace("xlink:", ""))
        ids += [str(element.get("id")) for element in root.iter() if element.get("id")]
        used = {element.get("href", "")[1:] for element in root.iter() if element.get("href")}
        assert used
        assert used <= {*ids}
        assert "var(--series-1)" in svg
        assert not re.search("|".join(["http|<metadata|<style|xmlns", *COLORS]), svg)
        assert (bool(root.get("viewBox")), root.get("width")) == (True, None)
        assert "declip up to 50.0 %" in (root.get("aria-label") or "")
    assert len(ids) == len(set(ids))
