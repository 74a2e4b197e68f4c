"""The charts: what they smooth, where they put things, what they say."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from declip.reports.charts import (
    HEIGHT,
    WIDTH,
    Line,
    accuracy_chart,
    nice_ticks,
    smoothed,
    term_chart,
    thinned,
)


def _points(svg: str, style: str) -> list[tuple[float, float]]:
    path = next(
        element.get("d")
        for element in ElementTree.fromstring(svg)
        if (element.get("class") or "").split() == style.split()
    )
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", path or "")]


def _texts(svg: str, style: str) -> list[str]:
    return [
        (element.text or "").replace("\N{NO-BREAK SPACE}", " ")
        for element in ElementTree.fromstring(svg)
        if style in (element.get("class") or "").split()
    ]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0, 1, [0, 0.25, 0.5, 0.75, 1.0]),
        (0.3, 4.9, [0, 2, 4, 6]),
        (-0.95, -0.1, [-1.0, -0.75, -0.5, -0.25, 0.0]),
        (5, 5, [4, 6]),
    ],
)
def test_nice_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_a_constant_is_smoothed_to_itself_and_a_gap_has_no_weight() -> None:
    values = np.full(100, 3.0)
    values[40] = np.nan
    smooth = smoothed(values)
    np.testing.assert_allclose(smooth[np.isfinite(values)], 3.0)
    assert np.isnan(smooth[40])


def test_smoothing_takes_away_noise_and_keeps_the_level() -> None:
    rng = np.random.default_rng(0)
    values = 2 + rng.standard_normal(600)
    smooth = smoothed(values)
    assert smooth.std() < 0.25
    assert smooth.mean() == pytest.approx(2, abs=0.1)


def test_thinning_keeps_every_spike() -> None:
    values = np.zeros(10_000)
    values[[123, 7777]] = 5, -5
    steps, kept = thinned(np.arange(10_000), values)
    assert len(kept) < 600
    assert (kept.max(), kept.min()) == (5, -5)
    assert set(steps) >= {123, 7777}


def test_a_falling_term_goes_down_and_says_so() -> None:
    steps = np.arange(10, 1001, 10)
    svg = term_chart("Total", steps, np.linspace(5, 1, 100))
    path = _points(svg, "smooth")
    assert [x for x, _ in path] == sorted(x for x, _ in path)
    assert path[-1][1] > path[0][1] + 100  # y grows downwards
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in path)
    label = ElementTree.fromstring(svg).get("aria-label") or ""
    assert re.fullmatch(r"Total, from 4\.\d+ at step 10 to 1\.\d+ at step 1,000\.", label)


def test_values_that_are_not_finite_leave_a_gap() -> None:
    svg = term_chart("x", np.arange(5), np.array([1.0, np.nan, 2.0, np.inf, 1.0]))
    assert "nan" not in svg.lower()
    assert "inf" not in svg.lower()
    raw = next(e.get("d") for e in ElementTree.fromstring(svg) if e.get("class") == "raw")
    assert (raw or "").count("M") == 3
    assert "Nothing was logged" in term_chart("x", np.arange(2), np.full(2, np.nan))


def test_one_point_is_a_chart_too() -> None:
    assert len(_points(term_chart("x", np.array([7]), np.array([0.5])), "smooth")) == 1


def test_the_accuracy_chart_labels_its_lines_and_the_chance() -> None:
    lines = [Line("top-1", [100, 200], [0.1, 0.2]), Line("top-5", [100, 200], [0.3, 0.4])]
    svg = accuracy_chart(lines, 0.05)
    assert set(_texts(svg, "end")) == {"top-1 20.0 %", "top-5 40.0 %"}
    assert _texts(svg, "chance-label") == ["chance 5.0 %"]
    (_, first), (_, last) = _points(svg, "line c1")
    assert first - last == pytest.approx((HEIGHT - 38) * 0.1 / 0.4, abs=0.2)


def test_labels_that_would_cover_each_other_are_moved_apart() -> None:
    lines = [Line("a", [1, 2], [0.3, 0.30]), Line("b", [1, 2], [0.1, 0.301])]
    svg = accuracy_chart(lines, 0.299)
    heights = sorted(
        float(element.get("y") or 0)
        for element in ElementTree.fromstring(svg)
        if {"end", "chance-label"} & set((element.get("class") or "").split())
    )
    assert min(np.diff(heights)) >= 14
    assert heights[-1] <= HEIGHT
    assert heights[0] >= 8


def test_names_are_escaped() -> None:
    svg = accuracy_chart([Line("<b>&", [1], [0.5])], 0.1)
    assert "&lt;b&gt;&amp;" in svg
    assert "<b>" not in svg
