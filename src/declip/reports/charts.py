"""Charts: matplotlib figures as inline SVG that takes its colors from the page, light or dark, and as PNG."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from math import ceil
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from scipy.optimize import isotonic_regression

from declip.io.text import percent, short_count

INK, QUIET, RULE = "#1c2127", "#5b6470", "#d9d5cc"
COLORS = (INK, "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
"""Okabe and Ito's palette, which color-blind readers can distinguish; the baseline is black."""

MARKERS = ("s", "o", "^", "D", "v", "P")
DASHES: tuple[tuple[float, ...], ...] = ((5, 2), (), (1, 1.3), (7, 1.6, 1.2, 1.6), (3, 1.2, 1, 1.2, 1, 1.2), (9, 3))
DOTTED = (0, (1, 2))

VARIABLES = {
    INK: "--ink",
    QUIET: "--quiet",
    RULE: "--line",
    **{color: f"--series-{place}" for place, color in enumerate(COLORS) if place},
}
"""The page's name for each color, so that it can choose others when it is dark."""

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.labelsize": 10,
    "text.color": INK,
    "axes.labelcolor": QUIET,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "declip",
}
LABEL_HEIGHT, LABEL_SHIFT = 13.0, 16.0
"""Points: height of a label, and how far one may be from the end of its line."""

LABEL_LETTERS, LEGEND_LETTERS = 20, 40
"""Longest label at a line's end, and in a legend."""

STRETCHES = 240
"""Of a long line each stretch is drawn as its lowest and highest value."""

SIDE_BY_SIDE = 2
"""Panels in a row of a PNG: more would be too small in print."""


@dataclass(frozen=True)
class Chart:
    """A figure of one panel.

    Attributes:
        words: Its content, for those who cannot see it.
        size: Inches.
        label: Draws what needs the final size of the axes.
    """

    words: str
    size: tuple[float, float]
    draw: Callable[[Axes], None]
    label: Callable[[Axes], None] = lambda ax: None

    def svg(self, name: str) -> Markup:
        """An SVG element whose ids start with `name`, so that it shares none with others on the page."""
        file = StringIO()
        with rc_context(STYLE):
            nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
            figure_of([self]).savefig(file, format="svg", transparent=True, metadata=nothing)
        text = file.getvalue()
        text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text[text.index("<svg") :])
        for _ in ("width", "height"):
            text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
        text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)  # it would be the whole page's
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
        text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
        text = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 inherit", text)
        for color, variable in VARIABLES.items():
            text = text.replace(color, f"var({variable})")
        return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(self.words)}"', 1))


def figure_of(charts: Sequence[Chart]) -> Figure:
    """Draw charts into one figure, in rows of at most `SIDE_BY_SIDE`."""
    rows = [charts[start : start + SIDE_BY_SIDE] for start in range(0, len(charts), SIDE_BY_SIDE)]
    heights = [max(chart.size[1] for chart in row) for row in rows]
    widths = [chart.size[0] for chart in rows[0]]
    with rc_context(STYLE):
        figure = Figure(figsize=(sum(widths), sum(heights)), layout="constrained")
        grid = figure.subfigures(len(rows), len(rows[0]), squeeze=False, width_ratios=widths, height_ratios=heights)
        axes: list[Axes] = [part.subplots() for part, _ in zip(grid.flat, charts, strict=False)]
        for chart, ax in zip(charts, axes, strict=True):
            chart.draw(ax)
        figure.draw_without_rendering()
        for chart, ax in zip(charts, axes, strict=True):
            chart.label(ax)
    return figure


def write_png(charts: Sequence[Chart], path: Path) -> None:
    """Write charts as one image of 200 dots an inch."""
    with rc_context(STYLE):
        figure_of(charts).savefig(path, dpi=200, facecolor="white", format="png")


def value_chart(name: str, steps: np.ndarray, values: np.ndarray, noisy: bool = True) -> Chart | None:
    """A quantity, (n,), over the steps, thin as logged and, if noisy, thick smoothed; None when none is finite."""
    finite = np.isfinite(values)
    if not finite.any():
        return None
    smooth = smoothed(values) if noisy else values
    # The rare outliers would flatten the rest.
    low, high = np.percentile(values[finite], [0.5, 99.5])
    low, high = min(low, smooth[finite].min()), max(high, smooth[finite].max())

    def draw(ax: Axes) -> None:
        if noisy:
            ax.plot(*thinned(steps, np.where(finite, values, np.nan)), color=COLORS[1], linewidth=0.6, alpha=0.45)
        at = np.unique(np.linspace(0, len(steps) - 1, STRETCHES).round().astype(int))
        ax.plot(steps[at], smooth[at], color=COLORS[1], linewidth=1.9, label=name)
        if len(at) == 1:
            ax.plot(steps, values, "o", color=COLORS[1], markersize=4)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        ax.set_ylim(low - margin, high + margin)
        _over_steps(ax)

    first, last = np.flatnonzero(finite)[[0, -1]]
    words = f"{name}, from {smooth[first]:.4g} at step {steps[first]:,} to {smooth[last]:.4g} at step {steps[last]:,}."
    return Chart(words, (3.3, 1.75), draw)


@dataclass(frozen=True)
class Scores:
    """A line of fractions between 0 and 1, labeled at its end."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


def score_chart(lines: Sequence[Scores], chance: float) -> Chart:
    """Fractions over the steps, in %, with the chance level."""
    top = 100 * max(chance, *(value for line in lines for value in line.values), 1e-3)
    shown = [(f"{line.name} {percent(line.values[-1])}", line, color) for line, color in zip(lines, COLORS[1:])]  # noqa: B905

    def draw(ax: Axes) -> None:
        ax.axhline(100 * chance, color=QUIET, linewidth=1.2, linestyle=DOTTED, label="chance")
        for name, line, color in shown:
            ax.plot(
                line.steps, 100 * np.array(line.values), "o-", color=color, linewidth=1.8, markersize=3.5, label=name
            )
        ax.set_ylim(0, 1.06 * top)
        ax.set_xlim(left=0)
        _over_steps(ax)
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))

    def label(ax: Axes) -> None:
        ends = [(100 * line.values[-1], name, line.steps[-1], color) for name, line, color in shown]
        _label_ends(ax, [(100 * chance, f"chance {percent(chance)}", ax.get_xlim()[1], QUIET), *ends])

    words = "; ".join(f"{line.name} from {percent(line.values[0])} to {percent(line.values[-1])}" for line in lines)
    return Chart(f"{words}; chance {percent(chance)}.", (4.2, 2.1), draw, label)


@dataclass(frozen=True)
class PairsLine:
    """A variant's curve, in %.

    Attributes:
        place: Index into `COLORS`, `MARKERS` and `DASHES`.
        half_widths: (k,) of the intervals; NaN where there is one seed.
        values: For each number of pairs, each seed's.
    """

    name: str
    place: int
    pairs: tuple[int, ...]
    means: np.ndarray
    half_widths: np.ndarray
    values: tuple[tuple[float, ...], ...]


def pairs_chart(
    title: str, unit: str, lines: Sequence[PairsLine], pairs: Sequence[int], chance: float, top: float
) -> Chart:
    """Curves against the number of distinct pairs: means, intervals as bars, a small dot for each seed, chance dotted.

    Args:
        lines: At most as many as there are `COLORS`.
        pairs: All numbers of pairs of the study.
        chance, top: In %; the upper end of the axis is the same for panels next to each other.
    """
    logs = np.log(pairs)
    step = min([0.02 * (1.12 * (logs[-1] - logs[0]) or 1.0), *0.8 * np.diff(logs) / max(len(lines), 1)])
    # Lines are drawn slightly apart from each other, in log(pairs), so that bars do not hide each other.
    shifts = step * (np.arange(len(lines)) - (len(lines) - 1) / 2)

    def draw(ax: Axes) -> None:
        low, high = logs[0], logs[-1]
        margin = max(0.06 * (high - low), 1.2 * (np.abs(shifts).max(initial=0) + step)) if high > low else 0.5
        ax.set_xscale("log")
        ax.set_xlim(np.exp(low - margin), np.exp(high + margin))
        ax.xaxis.set_major_locator(FixedLocator(list(pairs)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(list(pairs), _tick_labels(pairs))
        ax.set_ylim(0, top)
        ax.set(title=title, xlabel="distinct pairs", ylabel=f"{unit}, %")
        ax.grid(axis="y")
        ax.axhline(chance, color=QUIET, linewidth=1.3, linestyle=DOTTED, label="chance")
        for line, shift in zip(lines, shifts, strict=True):
            color, x = COLORS[line.place], np.array(line.pairs) * np.exp(shift)
            style: Any = {"color": color, "linewidth": 1.8, "marker": MARKERS[line.place], "markersize": 5}
            dashes = DASHES[line.place]
            ax.plot(x, line.means, label=line.name, linestyle=(0, dashes) if dashes else "-", **style)
            if (known := ~np.isnan(line.half_widths)).any():
                bars: Any = {"fmt": "none", "ecolor": color, "elinewidth": 1, "capsize": 2.5}
                ax.errorbar(x[known], line.means[known], line.half_widths[known], **bars)
            across = np.repeat(x * np.exp(step / 2), [len(values) for values in line.values])
            ax.plot(across, np.concatenate(line.values), ".", color=color, markersize=3.5, alpha=0.7)

    def label(ax: Axes) -> None:
        ends = [
            (line.means[-1], line.name, line.pairs[-1] * np.exp(shift), COLORS[line.place])
            for line, shift in zip(lines, shifts, strict=True)
        ]
        _label_ends(ax, [(chance, "chance", ax.get_xlim()[1], QUIET), *ends])

    words = "; ".join(
        f"{line.name} from {line.means[0]:.3g} % with {line.pairs[0]:,} pairs to {line.means[-1]:.3g} % "
        f"with {line.pairs[-1]:,}"
        for line in lines
    )
    return Chart(f"{title}: {words}; chance {chance:.3g} %.", (4.1, 3.3), draw, label)


@dataclass(frozen=True)
class PartRow:
    """A row of `parts_chart`, in %, with `aside` at the right; a heading has no place in `COLORS` and `MARKERS`."""

    name: str
    mean: float | None = None
    half_width: float | None = None
    values: tuple[float, ...] = ()
    aside: str = ""
    place: int | None = None


def parts_chart(title: str, rows: Sequence[PartRow], whole: float | None, aside: str = "") -> Chart:
    """Dots under each other: a large one for each mean, a bar for its interval, a small one for each seed.

    Args:
        whole: Where the dotted line of the whole recipe is, in %.
        aside: Heading of the column at the right.
    """
    tall = np.array([1 + 0.45 * row.name.count("\n") + 0.3 * (row.place is None) for row in rows])
    heights = tall / 2 - np.cumsum(tall)

    def draw(ax: Axes) -> None:
        ax.set_ylim(-tall.sum() - 0.2, 0.2)
        ax.set_yticks(heights, [row.name for row in rows])
        for text, row in zip(ax.get_yticklabels(), rows, strict=True):
            text.set_color(INK if row.place is not None else QUIET)
            text.set_fontstyle("normal" if row.place is not None else "italic")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x")
        ax.set(title=title, xlabel="%")
        if whole is not None:
            ax.axvline(whole, color=QUIET, linewidth=1.2, linestyle=DOTTED)
        for height, row in zip(heights, rows, strict=True):
            if row.mean is None or row.place is None:
                continue
            color = COLORS[row.place]
            if row.half_width is not None:
                ends = [row.mean - row.half_width, row.mean + row.half_width]
                ax.plot(ends, [height] * 2, color=color, linewidth=1.4)
            ax.plot(row.values, [height] * len(row.values), ".", color=color, markersize=4, alpha=0.55)
            name = row.name.replace("\n", " ")
            ax.plot([row.mean], [height], MARKERS[row.place], color=color, markersize=6, label=name)
        ax.set_xlim(*_range(rows))

    def label(ax: Axes) -> None:
        across = ax.get_yaxis_transform()
        for height, row in zip(heights, rows, strict=True):
            if row.aside:
                ax.text(1.04, height, row.aside, transform=across, va="center", color=INK)
        if aside:
            ax.text(1.04, ax.get_ylim()[1], aside, transform=across, va="bottom", color=QUIET)

    words = ", ".join(f"{' '.join(row.name.split())} {row.mean:.3g} %" for row in rows if row.mean is not None)
    return Chart(f"{title}: {words}.", (4.1, 0.9 + 0.29 * float(tall.sum())), draw, label)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a 15th of the values, with a Gaussian's weights; values that are not finite have no weight."""
    sigma = max(1.0, len(values) / 30)
    reach = np.arange(-ceil(3 * sigma), ceil(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    finite = np.isfinite(values)
    middle = slice(len(reach) // 2, len(reach) // 2 + len(values))
    total = np.convolve(np.where(finite, values, 0.0), kernel)[middle]
    weight = np.convolve(finite.astype(float), kernel)[middle]
    return np.where(finite, total / np.maximum(weight, 1e-12), np.nan)


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep at most about 2 × `STRETCHES` points: each stretch's lowest and highest value."""
    if len(steps) <= 2 * STRETCHES:
        return steps, values
    keep: list[int] = []
    for part in np.array_split(np.arange(len(steps)), STRETCHES):
        good = part[np.isfinite(values[part])]
        if len(good):
            keep += sorted({int(good[values[good].argmin()]), int(good[values[good].argmax()])})
    return steps[keep], values[keep]


def label_heights(heights: Sequence[float], top: float) -> list[float] | None:
    """Move labels, rising, to be `LABEL_HEIGHT` apart; None when one would be over `LABEL_SHIFT` from its line."""
    steps = LABEL_HEIGHT * np.arange(len(heights))
    ends = sorted((0.0, top - steps[-1]))
    placed = np.clip(isotonic_regression(np.asarray(heights) - steps).x, *ends) + steps
    return placed.tolist() if np.abs(placed - heights).max() <= LABEL_SHIFT else None


def _label_ends(ax: Axes, ends: Sequence[tuple[float, str, float, str]]) -> None:
    """Write names (value, name, x, color) at the ends of lines, or a legend where they are too near or too long."""
    bottom, top = ax.get_ylim()
    height = ax.bbox.height * 72 / ax.figure.dpi
    ends = sorted(ends)
    names = [name for _, name, *_ in ends]
    places = label_heights([(value - bottom) / (top - bottom) * height for value, *_ in ends], height)
    if places is None or max(map(len, names)) > LABEL_LETTERS:
        handles = [shape for shape in ax.lines if not str(shape.get_label()).startswith("_child")]
        # a label that starts with "_" would be left out
        shown = [" " + shorten(str(shape.get_label()), LEGEND_LETTERS, placeholder=" …") for shape in handles]
        columns = 1 if max(map(len, names)) > LABEL_LETTERS else 2
        ax.figure.legend(handles, shown, loc="outside lower left", ncols=columns, frameon=False)
        return
    for place, (value, name, start, color) in zip(places, ends, strict=True):
        arrow = {"arrowstyle": "-", "color": color, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)}
        ax.annotate(
            name,
            xy=(start, value),
            xytext=(1.03, place / height),
            textcoords="axes fraction",
            va="center",
            annotation_clip=False,
            color=QUIET if color == QUIET else INK,
            arrowprops=arrow,
        )


def _over_steps(ax: Axes) -> None:
    ax.grid(axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(round(value))))


def _range(rows: Sequence[PartRow]) -> tuple[float, float]:
    """Every seed and mean, and as much of the intervals as leaves the rest readable."""
    known = [row for row in rows if row.mean is not None]
    values = [value for row in known for value in (row.mean, *row.values) if value is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) or 0.1 * abs(high) or 1.0
    ends = [row.mean + sign * row.half_width for row in known if row.mean and row.half_width for sign in (-1, 1)]
    low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    return max(0.0, low - 0.05 * room), high + 0.05 * room


def _tick_labels(pairs: Sequence[int]) -> list[str]:
    """Labels of the ticks; of two that would touch only the first has one."""
    width = np.log(pairs[-1] / pairs[0]) or 1.0
    labels, last = [], -1.0
    for number in pairs:
        place = np.log(number / pairs[0]) / width
        labels.append("" if last >= 0 and place - last < 0.13 else short_count(number))
        last = place if labels[-1] else last
    return labels
