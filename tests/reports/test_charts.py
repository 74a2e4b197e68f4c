"""The charts, read from their axes, and their SVG."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from PIL import Image

from comparison.synthetic import MEASURE, outcome, study, taken_apart
from declip.comparison.outcome import Outcome
from declip.reports.charts import COLORS, Chart, figure_of, score_chart, smoothed, thinned, value_chart, write_png
from declip.reports.comparison import Panels, curves_figure

BUDGETS = ("samples", "compute")


def axes(chart: Chart) -> Axes:
    (ax,) = figure_of([chart]).get_axes()
    return ax


def curves(found: Outcome) -> Panels:
    return curves_figure(found, MEASURE, 1, 0.005)


def names(ax: Axes) -> list[str]:
    (legend,) = ax.figure.legends
    return [text.get_text().strip() for text in legend.get_texts()]


def xy(ax: Axes, name: str) -> tuple[np.ndarray, np.ndarray]:
    handles, labels = ax.get_legend_handles_labels()
    handle = handles[[label.strip() for label in labels].index(name)]
    line = handle[0] if isinstance(handle, tuple) else handle
    return np.asarray(line.get_xdata(), dtype=float), np.asarray(line.get_ydata(), dtype=float)


def test_smoothing_takes_away_noise_keeps_the_level_and_skips_gaps() -> None:
    smooth = smoothed(2 + np.random.default_rng(0).standard_normal(600))
    assert smooth.std() < 0.25
    assert smooth.mean() == pytest.approx(2, abs=0.1)
    constant = np.full(100, 3.0)
    constant[40] = np.nan
    np.testing.assert_allclose(np.delete(smoothed(constant), 40), 3.0)
    assert np.isnan(smoothed(constant)[40])


def test_thinning_keeps_every_spike() -> None:
    values = np.zeros(10_000)
    values[[123, 7777]] = 5, -5
    steps, kept = thinned(np.arange(10_000), values)
    assert len(kept) < 600
    assert (kept.max(), kept.min()) == (5, -5)
    assert set(steps) >= {123, 7777}


def test_a_value_over_the_steps() -> None:
    chart = value_chart("total", np.arange(10, 1001, 10), np.linspace(5, 1, 100))
    assert chart is not None
    steps, values = xy(axes(chart), "total")
    assert (steps[0], steps[-1]) == (10, 1000)
    assert values[0] > values[-1] + 3
    assert re.fullmatch(r"total, from 4\.\d+ at step 10 to 1\.\d+ at step 1,000\.", chart.words)
    assert value_chart("x", np.arange(2), np.full(2, np.nan)) is None
    for steps, values in ((np.arange(5), [1.0, np.nan, 2.0, np.inf, 1.0]), (np.array([7]), [0.5])):
        chart = value_chart("x", steps, np.array(values))
        assert chart is not None
        axes(chart)


def test_scores_are_named_with_their_last_value_and_chance_is_shown() -> None:
    ax = axes(score_chart({"top-1": [0.1, 0.2], "top-5": [0.3, 0.4]}, [100, 200], 0.05))
    assert names(ax) == ["chance 5.0 %", "top-1 20.0 %", "top-5 40.0 %"]
    np.testing.assert_allclose(xy(ax, "top-1 20.0 %")[1], [10, 20])
    np.testing.assert_allclose(xy(ax, "chance 5.0 %")[1], 5)


def test_curves_show_means_intervals_seeds_and_chance() -> None:
    ax = axes(curves(outcome(study())).charts[0])
    np.testing.assert_allclose(xy(ax, "clip")[1], [10, 20, 30, 40])
    np.testing.assert_allclose(xy(ax, "declip")[0], [1000, 2000, 4000, 8000], rtol=0.05)
    np.testing.assert_allclose(xy(ax, "chance")[1], 0.5)
    seeds = next(each for each in ax.lines if each.get_marker() == ".")
    np.testing.assert_allclose(sorted(np.asarray(seeds.get_ydata()))[:3], [9, 10, 11])
    bars = next(each for each in ax.collections if isinstance(each, LineCollection))
    assert np.array(bars.get_segments()[0])[:, 1] == pytest.approx([10 - 2.484, 10 + 2.484], abs=1e-3)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1k", "2k", "4k", "8k"]
    wide = outcome(study(seeds=(0, 1)), value=lambda trial: 0.3 + 0.05 * trial.seed)
    assert 35 < axes(curves(wide).charts[0]).get_ylim()[1] < 55  # the interval of two seeds reaches up to 64 %


def test_two_budgets_have_the_same_axis_and_parts_are_not_among_the_curves() -> None:
    found = outcome(taken_apart(study(budgets=BUDGETS)), value=lambda trial: trial.steps / 1000)
    samples, compute = map(axes, curves(found).charts)
    assert samples.get_ylim() == compute.get_ylim()
    np.testing.assert_allclose(xy(samples, "clip")[1], 10)
    np.testing.assert_allclose(xy(compute, "clip")[1], 20)
    assert names(samples) == ["chance", "clip", "declip"]


def test_many_and_strange_names_are_shown_and_escaped() -> None:
    plan, strange = study(), '_<b>"&$x$ long name'
    more = tuple(replace(plan.variants[1], name=f"{strange}{number}") for number in range(10))
    chart = curves(outcome(replace(plan, variants=(*plan.variants, *more), seconds={}))).charts[0]
    assert names(axes(chart)) == ["chance", "clip", "declip", *(variant.name for variant in more)]
    svg = chart.svg("n")
    assert "<b>" not in svg
    assert '&lt;b&gt;"&amp;$x$' in svg
    ElementTree.fromstring(svg.replace("xlink:", ""))


def test_svgs_take_their_colors_from_the_page_and_share_no_ids_and_a_png_has_all_panels(tmp_path: Path) -> None:
    ids: list[str] = []
    charts = curves(outcome(study(budgets=BUDGETS))).charts
    for name, chart in zip("ab", charts, strict=True):
        svg = chart.svg(name)
        root = ElementTree.fromstring(svg.replace("xlink:", ""))
        ids += [str(element.get("id")) for element in root.iter() if element.get("id")]
        used = [element.get("href", "") for element in root.iter() if element.get("href")]
        assert used
        assert all(target[1:] in ids for target in used)
        assert "var(--series-1)" in svg
        assert not re.search(r"http|<metadata|<style|xmlns", svg)
        assert not [color for color in COLORS if color in svg]
        assert root.get("viewBox")
        assert root.get("width") is None
        assert "declip from 20 % with 1,000 pairs to 50 % with 8,000" in (root.get("aria-label") or "")
    assert len(ids) == len(set(ids))
    write_png(charts, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1640, 686)
