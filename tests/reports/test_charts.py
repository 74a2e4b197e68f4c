"""The charts, read from their axes, and their SVG."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from PIL import Image

from comparison.synthetic import MEASURE, outcome, study, taken_apart
from declip.comparison.ablation import read_ablation
from declip.comparison.outcome import Outcome
from declip.reports.charts import (
    COLORS,
    DASHES,
    LABEL_HEIGHT,
    MARKERS,
    Chart,
    PairsLine,
    Scores,
    figure_of,
    label_heights,
    pairs_chart,
    score_chart,
    smoothed,
    thinned,
    value_chart,
    write_png,
)
from declip.reports.comparison import Panels, curve_figures, parts_figure


def axes(chart: Chart) -> Axes:
    (ax,) = figure_of([chart]).get_axes()
    return ax


def curves(found: Outcome) -> Panels:
    (figure,) = curve_figures(found, MEASURE, 0, 0.005).values()
    return figure


def line(ax: Axes, name: str) -> Line2D:
    return next(each for each in ax.lines if each.get_label() == name)


def xy(ax: Axes, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = line(ax, name)
    return np.asarray(found.get_xdata(), dtype=float), np.asarray(found.get_ydata(), dtype=float)


def test_smoothing_takes_away_noise_keeps_the_level_and_skips_gaps() -> None:
    values = 2 + np.random.default_rng(0).standard_normal(600)
    smooth = smoothed(values)
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
        assert "<path" in chart.svg("x")


def test_scores_are_labeled_and_chance_is_shown() -> None:
    chart = score_chart([Scores("top-1", [100, 200], [0.1, 0.2]), Scores("top-5", [100, 200], [0.3, 0.4])], 0.05)
    ax = axes(chart)
    assert {text.get_text() for text in ax.texts} == {"top-1 20.0 %", "top-5 40.0 %", "chance 5.0 %"}
    np.testing.assert_allclose(xy(ax, "top-1 20.0 %")[1], [10, 20])
    np.testing.assert_allclose(xy(ax, "chance")[1], 5)
    near = [Scores(name, [1, 2], [0.3, 0.3]) for name in "abcde"]
    assert axes(score_chart(near, 0.3)).figure.legends, "a legend where labels would cover each other"


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
    assert {text.get_text() for text in ax.texts} == {"clip", "declip", "chance"}
    assert not axes(curves(outcome(study(seeds=(1,)))).charts[0]).collections, "one seed has no bars"
    wide = outcome(study(seeds=(0, 1)), value=lambda trial: 0.3 + 0.05 * trial.seed)
    assert 35 < axes(curves(wide).charts[0]).get_ylim()[1] < 55  # the interval of two seeds reaches up to 64 %


def test_two_budgets_have_the_same_axis_and_parts_are_not_among_the_curves() -> None:
    found = outcome(taken_apart(study(budgets=("samples", "compute"))), value=lambda trial: trial.steps / 1000)
    samples, compute = map(axes, curves(found).charts)
    assert samples.get_ylim() == compute.get_ylim()
    np.testing.assert_allclose(xy(samples, "clip")[1], 10)
    np.testing.assert_allclose(xy(compute, "clip")[1], 20)
    assert {text.get_text() for text in samples.texts} == {"clip", "declip", "chance"}


def test_variants_differ_and_more_than_fit_go_to_further_figures() -> None:
    assert len(COLORS) == len(MARKERS) == len(DASHES) == len({*COLORS}) == len({*MARKERS}) == len({*DASHES})
    plan = study(("clip", "declip"))
    more = tuple(replace(plan.variants[1], name=f"slip{number}") for number in range(10))
    plan = replace(plan, variants=(*plan.variants, *more), seconds={})
    figures = curve_figures(outcome(plan), MEASURE, 0, 0.005).values()
    shown = [
        {name for each in axes(figure.charts[0]).lines if (name := str(each.get_label()))[0] != "_"}
        for figure in figures
    ]
    assert [len(names) for names in shown] == [7, 7, 3]
    assert all({"clip", "chance"} <= names for names in shown)
    assert len({figure.name for figure in figures}) == 3


def test_long_names_go_to_a_legend_and_are_escaped() -> None:
    means = np.array([10.0, 20.0])
    rows = [
        PairsLine(f'_{n} <b>"&$x$ long name', n, (1, 2), means + n, means * np.nan, ((10.0,), (20.0,))) for n in (0, 1)
    ]
    chart = pairs_chart("t", "u", rows, (1, 2), 1, 30)
    (legend,) = axes(chart).figure.legends
    assert [text.get_text().strip() for text in legend.get_texts()] == ["chance", *(row.name for row in rows)]
    svg = chart.svg("n")
    assert "<b>" not in svg
    assert '&lt;b&gt;"&amp;$x$' in svg
    ElementTree.fromstring(svg.replace("xlink:", ""))


def test_labels_are_moved_apart_as_little_as_possible() -> None:
    assert label_heights([10, 40], 100) == [10, 40]
    assert label_heights([50, 52], 100) == pytest.approx([51 - LABEL_HEIGHT / 2, 51 + LABEL_HEIGHT / 2])
    assert label_heights([99, 100], 100) == pytest.approx([100 - LABEL_HEIGHT, 100])
    assert label_heights([50] * 6, 100) is None


def test_an_ablation_has_a_dot_for_each_part_and_the_reported_numbers() -> None:
    plan = taken_apart(study())
    found = outcome(plan, done=lambda trial: trial.variant != "without simsiam")
    ablation = read_ablation(plan)
    assert ablation is not None
    ours, reported = map(axes, parts_figure(found, ablation, MEASURE, 8000).charts)
    np.testing.assert_allclose(xy(ours, "+multi_view")[0], [100 * 0.1 * np.log2(16 * 1.5)])
    assert {text.get_text() for text in ours.texts} >= {"−10.0", "not yet", "− whole"}
    assert "simsiam" not in {each.get_label() for each in ours.lines}
    heights = [xy(ours, name)[1][0] for name in ("clip", "+multi_view", "+nearest_neighbor = declip")]
    assert heights == sorted(heights, reverse=True)
    assert {text.get_text() for text in reported.texts} == {"20.6", "24.8", "25.4", "27.2"}


def test_svgs_take_their_colors_from_the_page_and_share_no_ids() -> None:
    ids: list[str] = []
    for svg in curves(outcome(study(budgets=("samples", "compute")))).svgs:
        root = ElementTree.fromstring(svg.replace("xlink:", ""))
        ids += [str(element.get("id")) for element in root.iter() if element.get("id")]
        used = [element.get("href", "") for element in root.iter() if element.get("href")]
        assert used
        assert all(name[1:] in ids for name in used)
        assert "var(--series-1)" in svg
        assert not re.search(r"http|<metadata|<style|xmlns", svg)
        assert not [color for color in COLORS if color in svg]
        assert root.get("viewBox")
        assert root.get("width") is None
        assert "declip from 20 % with 1,000 pairs to 50 % with 8,000" in (root.get("aria-label") or "")
    assert len(ids) == len(set(ids))


def test_a_png_has_its_panels_next_to_each_other(tmp_path: Path) -> None:
    write_png(curves(outcome(study(budgets=("samples", "compute")))).charts, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1640, 660)
