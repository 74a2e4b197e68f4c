"""The figures: what is drawn where, read from the axes."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from comparison.synthetic import MEASURE, outcome, study, with_ladder
from declip.comparison.ablation import read_ladder
from declip.comparison.outcome import Outcome
from declip.io.text import short_count
from declip.reports.comparison_charts import COLOURS, DASHES, LINE, MARKERS, Curves, Dots, Picture, apart
from declip.reports.comparison_figures import MOST, curve_pictures, ladder_picture


def _axes(panel: Curves | Dots) -> Axes:
    figure = Figure(figsize=panel.size, layout="constrained")
    ax = figure.subplots()
    panel.draw(ax)
    figure.draw_without_rendering()
    panel.label(ax)
    return ax


def _curves(found: Outcome, chance: float = 0.005) -> Picture:
    (picture,) = curve_pictures(found, MEASURE, 0, chance)
    return picture


def _line(ax: Axes, name: str) -> Line2D:
    return next(line for line in ax.lines if line.get_label() == name)


def _x(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xdata(), dtype=float)


def _y(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata(), dtype=float)


def test_curves_show_means_intervals_seeds_and_chance() -> None:
    (panel,) = _curves(outcome(study())).panels
    assert isinstance(panel, Curves)
    ax = _axes(panel)
    np.testing.assert_allclose(_y(_line(ax, "clip")), [10, 20, 30, 40])
    np.testing.assert_allclose(_y(_line(ax, "declip")), [20, 30, 40, 50])
    np.testing.assert_allclose(_x(_line(ax, "clip")), [1000, 2000, 4000, 8000], rtol=0.05)
    np.testing.assert_allclose(_y(_line(ax, "chance")), 0.5)
    seeds = [line for line in ax.lines if line.get_marker() == "."]
    np.testing.assert_allclose(sorted(_y(seeds[0])), [9, 10, 11, 19, 20, 21, 29, 30, 31, 39, 40, 41])
    bars = [each for each in ax.collections if isinstance(each, LineCollection)]
    low, high = np.array(bars[0].get_segments()[0])[:, 1]
    assert (low, high) == (pytest.approx(10 - 2.484, abs=1e-3), pytest.approx(10 + 2.484, abs=1e-3))
    assert ax.get_xscale() == "log"
    np.testing.assert_allclose(ax.get_xticks(), [1000, 2000, 4000, 8000])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1k", "2k", "4k", "8k"]
    assert ax.get_ylim() == (0, panel.top)


def test_one_seed_has_no_bars() -> None:
    (panel,) = _curves(outcome(study(seeds=(1,)))).panels
    assert isinstance(panel, Curves)
    assert not _axes(panel).collections


def test_a_wide_interval_does_not_flatten_the_curves() -> None:
    found = outcome(study(seeds=(0, 1)), value=lambda cell: 0.3 + 0.05 * cell.seed)
    (panel,) = _curves(found).panels
    assert isinstance(panel, Curves)
    assert 35 < panel.top < 55  # the interval of two seeds reaches up to 64 %


def test_two_budgets_are_two_panels_with_the_same_axis() -> None:
    found = outcome(study(budgets=("samples", "compute")), value=lambda cell: cell.steps / 1000)
    samples, compute = _curves(found).panels
    assert isinstance(samples, Curves)
    assert isinstance(compute, Curves)
    assert (samples.title, compute.title) == ("equal samples", "equal compute")
    assert samples.top == compute.top
    np.testing.assert_allclose(samples.lines[0].means, 10)
    np.testing.assert_allclose(compute.lines[0].means, 20)


def test_arms_differ_by_color_marker_and_dashes() -> None:
    assert len(COLOURS) == len(MARKERS) == len(DASHES) == MOST
    for styles in (COLOURS, MARKERS, DASHES):
        assert len(set(styles)) == MOST
    names = ("clip", "slip", "filip", "declip")
    (panel,) = _curves(outcome(study(names))).panels
    assert isinstance(panel, Curves)
    lines = [_line(_axes(panel), name) for name in names]
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 4


def test_more_arms_than_fit_go_to_further_figures_each_with_the_baseline() -> None:
    plan = study(("clip", "slip", "filip", "declip"))
    more = tuple(replace(plan.arms[1], name=f"slip{number}") for number in range(7))
    plan = replace(plan, arms=(*plan.arms, *more), seconds={})
    pictures = curve_pictures(outcome(plan), MEASURE, 0, 0.005)
    shown = [
        [line.name for line in picture.panels[0].lines] for picture in pictures if isinstance(picture.panels[0], Curves)
    ]
    assert [len(names) for names in shown] == [6, 6]
    assert [names[0] for names in shown] == ["clip", "clip"]
    assert len({name for names in shown for name in names}) == 11
    assert len({picture.name for picture in pictures}) == 2


def test_ladders_are_not_among_the_curves() -> None:
    (panel,) = _curves(outcome(with_ladder(study()))).panels
    assert isinstance(panel, Curves)
    assert [line.name for line in panel.lines] == ["clip", "declip"]


def test_names_stand_at_the_ends_of_lines_or_in_a_legend() -> None:
    (panel,) = _curves(outcome(study())).panels
    assert isinstance(panel, Curves)
    ax = _axes(panel)
    assert {text.get_text() for text in ax.texts} == {"clip", "declip", "chance"}
    assert not ax.figure.legends

    long = replace(panel, lines=tuple(replace(line, name=f"_{line.name} <with> $a$ long name") for line in panel.lines))
    ax = _axes(long)
    assert not ax.texts
    shown = [text.get_text().strip() for text in ax.figure.legends[0].get_texts()]
    assert shown == ["chance", "_clip <with> $a$ long name", "_declip <with> $a$ long name"]

    near = replace(
        panel, lines=tuple(replace(panel.lines[0], name=f"arm{number}", place=number) for number in range(6))
    )
    assert not _axes(near).texts


def test_labels_are_moved_apart_as_little_as_possible() -> None:
    assert apart([10, 40], 100) == [10, 40]
    assert apart([50, 52], 100) == pytest.approx([51 - LINE / 2, 51 + LINE / 2])
    assert apart([99, 100], 100) == pytest.approx([100 - LINE, 100])
    assert apart([50] * 6, 100) is None


@pytest.mark.parametrize(
    ("number", "told"), [(64, "64"), (1000, "1k"), (2500, "2.5k"), (1234, "1,234"), (1_500_000, "1.5M")]
)
def test_counts_are_short_where_nothing_is_lost(number: int, told: str) -> None:
    assert short_count(number) == told


def test_the_caption_ranks_the_arms() -> None:
    caption = _curves(outcome(study())).caption
    assert caption == (
        f"{MEASURE}. At equal samples with 8,000 pairs: declip 50.0 %, clip 40.0 %. "
        "At equal samples with 1,000 pairs: declip 20.0 %, clip 10.0 %. Chance is 0.50 %."
    )


def test_the_ladder_has_a_dot_for_each_part_and_what_was_published() -> None:
    found = outcome(with_ladder(study()))
    ladder = read_ladder(found.study)
    assert ladder is not None
    ours, published = ladder_picture(found, ladder, MEASURE, 8000).panels
    assert isinstance(ours, Dots)
    assert isinstance(published, Dots)
    assert [row.name for row in ours.rows if row.place is None] == ["terms added", "term left out", "plain clip"]
    ax = _axes(ours)
    np.testing.assert_allclose(_x(_line(ax, "+multi_view")), [100 * 0.1 * np.log2(16 * 1.5)])
    assert {text.get_text() for text in ax.texts} >= {"−10.0 ± 0.0", "− whole"}
    heights = [_y(_line(ax, name))[0] for name in ("clip", "+multi_view", "+nearest_neighbor = declip")]
    assert heights == sorted(heights, reverse=True)
    assert [row.mean for row in published.rows] == [None, 20.6, 24.8, 25.4, 27.2]
    assert "published" in published.title


def test_a_part_that_was_not_measured_has_no_dot() -> None:
    found = outcome(with_ladder(study()), done=lambda cell: cell.arm != "without simsiam")
    ladder = read_ladder(found.study)
    assert ladder is not None
    panel = ladder_picture(found, ladder, MEASURE, 8000).panels[0]
    assert isinstance(panel, Dots)
    missing = next(row for row in panel.rows if row.name == "simsiam")
    assert (missing.mean, missing.beside) == (None, "not yet")
    assert not [line for line in _axes(panel).lines if line.get_label() == "simsiam"]


def test_svgs_take_their_colors_from_the_page_and_share_no_ids() -> None:
    svgs = _curves(outcome(study(budgets=("samples", "compute")))).svgs()
    ids = []
    for svg in svgs:
        root = ElementTree.fromstring(svg.replace("xlink:", ""))
        ids += [element.get("id") for element in root.iter() if element.get("id")]
        used = [element.get("href", "") for element in root.iter() if element.get("href")]
        assert used
        assert all(name[1:] in ids for name in used)
        assert "var(--series-1)" in svg
        assert not re.search(r"http|<metadata|xmlns", svg)
        assert not [color for color in COLOURS if color in svg]
        assert root.get("viewBox")
        assert root.get("width") is None
        assert "declip from 20 % with 1,000 pairs to 50 % with 8,000" in (root.get("aria-label") or "")
    assert len(ids) == len(set(ids))


def test_names_are_escaped_in_the_svg() -> None:
    picture = _curves(outcome(study()))
    (panel,) = picture.panels
    assert isinstance(panel, Curves)
    bad = replace(panel, lines=tuple(replace(line, name='<b>"&$x$') for line in panel.lines[:1]))
    svg = Picture("p", "", (bad,)).svgs()[0]
    assert "<b>" not in svg
    assert re.search(r">&lt;b&gt;\"&amp;\$x\$</text>", svg)
    ElementTree.fromstring(svg.replace("xlink:", ""))


def test_a_png_has_its_panels_side_by_side(tmp_path: Path) -> None:
    _curves(outcome(study(budgets=("samples", "compute")))).write_png(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (1640, 660)
        assert round(image.info["dpi"][0]) == 200


def test_no_marker_leaves_the_panel_however_many_arms() -> None:
    names = ("clip", "slip", "filip", "declip", "defilip", "declip-small")
    (panel,) = _curves(outcome(study(names), value=lambda cell: 0.1 + 0.01 * names.index(cell.arm))).panels
    assert isinstance(panel, Curves)
    ax = _axes(panel)
    low, high = np.log(ax.get_xlim())
    room = 0.015 * (high - low)  # half a marker
    for name in names:
        places = np.log(_x(_line(ax, name)))
        assert low + room < places.min()
        assert places.max() < high - room
