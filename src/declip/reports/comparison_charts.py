"""Drawing: curves against the number of pairs, and dots under each other; for the page as SVG, else as PNG."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from textwrap import shorten
from typing import Any, Protocol

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from sklearn.isotonic import isotonic_regression

from declip.io.text import short_count

INK, QUIET, RULE = "#1c2127", "#5b6470", "#d9d5cc"
COLOURS = (INK, "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
"""Okabe and Ito's palette, which color-blind readers can tell apart; the baseline is black."""

MARKERS = ("s", "o", "^", "D", "v", "P")
DASHES: tuple[tuple[float, ...], ...] = ((5, 2), (), (1, 1.3), (7, 1.6, 1.2, 1.6), (3, 1.2, 1, 1.2, 1, 1.2), (9, 3))

VARIABLES = {
    INK: "--ink",
    QUIET: "--quiet",
    RULE: "--line",
    **{color: f"--series-{place}" for place, color in enumerate(COLOURS) if place},
}
"""What the page calls each color, so that it can choose others when it is dark."""

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
    "grid.color": RULE,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "declip",
}
LINE, SHIFT = 13.0, 16.0
"""Points: height of a line of text, and how far a label may be from the end of its line."""

BESIDE = 2
"""Panels in a row of a PNG: more would be too small in print."""

WIDEST, LONGEST = 20, 40
"""Letters of a label at a line's end, and of one in a legend."""


class Panel(Protocol):
    """Something that draws itself into axes, and then, when their size is known, its labels."""

    @property
    def words(self) -> str: ...
    @property
    def size(self) -> tuple[float, float]: ...
    def draw(self, ax: Axes) -> None: ...
    def label(self, ax: Axes) -> None: ...


@dataclass(frozen=True)
class Picture:
    """A figure of one panel or several side by side.

    Attributes:
        name: Of its file, without the ending.
        caption: What it shows, in words and numbers.
        panels: From left to right.
    """

    name: str
    caption: str
    panels: tuple[Panel, ...]

    def svgs(self) -> list[Markup]:
        """Each panel on its own, so that a narrow page can put them one below the other."""
        return [_svg(panel, f"{self.name}-{place}") for place, panel in enumerate(self.panels)]

    def write_png(self, path: Path) -> None:
        """All panels in one image, two in a row, at 200 dots an inch."""
        figure = _drawn(self.panels)
        with rc_context(STYLE):
            figure.savefig(path, dpi=200, facecolor="white", format="png")


@dataclass(frozen=True)
class Line:
    """An arm's curve, in %.

    Attributes:
        name: Of the arm.
        place: Which of `COLOURS`, `MARKERS` and `DASHES`.
        pairs: (k,) rising.
        means: (k,).
        intervals: (k, 2); NaN where there is one seed.
        values: Of each number of pairs, each seed's.
    """

    name: str
    place: int
    pairs: tuple[int, ...]
    means: np.ndarray
    intervals: np.ndarray
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Curves:
    """Curves against the number of distinct pairs.

    Attributes:
        title: Of the panel.
        unit: What is shown, in %.
        lines: At most as many as there are `COLOURS`.
        pairs: All numbers of pairs of the study.
        chance: In %.
        top: Upper end of the axis, the same for panels side by side.
    """

    title: str
    unit: str
    lines: tuple[Line, ...]
    pairs: tuple[int, ...]
    chance: float
    top: float

    @property
    def size(self) -> tuple[float, float]:
        """Inches."""
        return 4.1, 3.3

    @property
    def words(self) -> str:
        """For those who cannot see it."""
        told = (
            f"{line.name} from {line.means[0]:.3g} % with {line.pairs[0]:,} pairs to {line.means[-1]:.3g} % "
            f"with {line.pairs[-1]:,}"
            for line in self.lines
        )
        return f"{self.title}: {'; '.join(told)}; chance {self.chance:.3g} %."

    def draw(self, ax: Axes) -> None:
        """Lines through the means, bars for the intervals, a small dot for each seed, chance dotted."""
        low, high = np.log(self.pairs[0]), np.log(self.pairs[-1])
        reach = max((abs(beside) + 2 * seeds for beside, seeds in self._places()), default=0.0)
        margin = max(0.06 * (high - low), 1.2 * reach) if high > low else 0.5
        ax.set_xscale("log")
        ax.set_xlim(np.exp(low - margin), np.exp(high + margin))
        ax.xaxis.set_major_locator(FixedLocator(list(self.pairs)))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_xticks(list(self.pairs), _labels(self.pairs))
        ax.set_ylim(0, self.top)
        ax.set(title=self.title, xlabel="distinct pairs", ylabel=f"{self.unit}, %")
        ax.grid(axis="y", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.axhline(self.chance, color=QUIET, linewidth=1.3, linestyle=(0, (1, 2)), label="chance")
        for line, (beside, seeds) in zip(self.lines, self._places(), strict=True):
            _draw_line(ax, line, beside, seeds)

    def _places(self) -> list[tuple[float, float]]:
        """How far the means and the seeds of each line are moved to the side, in log(pairs)."""
        logs = np.log(self.pairs)
        span = 1.12 * (logs[-1] - logs[0]) or 1.0
        step = min([0.02 * span, *0.8 * np.diff(logs) / max(len(self.lines), 1)])
        moved = step * (np.arange(len(self.lines)) - (len(self.lines) - 1) / 2)
        return [(float(each), step / 2) for each in moved]

    def label(self, ax: Axes) -> None:
        """Names at the ends of the lines; a legend below where they would be too near or too long."""
        ends = [
            (line.means[-1], line.name, line.pairs[-1] * np.exp(beside), COLOURS[line.place])
            for line, (beside, _) in zip(self.lines, self._places(), strict=True)
        ]
        height = ax.bbox.height * 72 / ax.figure.dpi
        names = [name for _, name, *_ in ends]
        wanted = sorted([(self.chance, "chance", ax.get_xlim()[1], QUIET), *ends])
        places = apart([value / self.top * height for value, *_ in wanted], height)
        if places is None or max(map(len, names)) > WIDEST:
            handles = [shape for shape in ax.lines if shape.get_label() in {"chance", *names}]
            # a label that starts with "_" would be left out
            shown = [" " + shorten(str(shape.get_label()), LONGEST, placeholder=" …") for shape in handles]
            columns = 1 if max(map(len, names)) > WIDEST else 2
            ax.figure.legend(handles, shown, loc="outside lower left", ncols=columns, frameon=False)
            return
        for place, (value, name, start, color) in zip(places, wanted, strict=True):
            ax.annotate(
                name,
                xy=(start, value),
                xytext=(1.03, place / height),
                textcoords="axes fraction",
                va="center",
                annotation_clip=False,
                color=QUIET if color == QUIET else INK,
                arrowprops={
                    "arrowstyle": "-",
                    "color": color,
                    "linewidth": 0.8,
                    "shrinkA": 1,
                    "shrinkB": 3,
                    "relpos": (0, 0.5),
                },
            )


@dataclass(frozen=True)
class Dot:
    """A row of a `Dots` panel, in %; without a value it is a heading.

    Attributes:
        name: At the left.
        mean: None for a heading, or when the arm was not measured.
        low, high: The interval; None with one seed.
        values: Each seed's.
        beside: At the right.
        place: Which of `COLOURS` and `MARKERS`.
    """

    name: str
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    values: tuple[float, ...] = ()
    beside: str = ""
    place: int | None = None

    @property
    def flat(self) -> str:
        """The name in one line."""
        return self.name.replace("\n", " ")

    @property
    def height(self) -> float:
        """In lines, with room above a heading."""
        return 1 + 0.45 * self.name.count("\n") + 0.3 * (self.place is None)


@dataclass(frozen=True)
class Dots:
    """Parts of a recipe under each other.

    Attributes:
        title: Of the panel.
        rows: From top to bottom.
        whole: Where the whole recipe is, in %; None when it was not measured.
        beside: What the column at the right is.
    """

    title: str
    rows: tuple[Dot, ...]
    whole: float | None
    beside: str = ""

    @property
    def size(self) -> tuple[float, float]:
        """Inches."""
        return 4.1, 0.9 + 0.29 * sum(row.height for row in self.rows)

    @property
    def words(self) -> str:
        """For those who cannot see it."""
        told = (f"{row.flat} {row.mean:.3g} %" for row in self.rows if row.mean is not None)
        return f"{self.title}: {', '.join(told)}."

    def draw(self, ax: Axes) -> None:
        """A dot for each mean, a bar for its interval, a small dot for each seed."""
        tall = np.array([row.height for row in self.rows])
        heights = tall / 2 - np.cumsum(tall)
        ax.set_ylim(-tall.sum() - 0.2, 0.2)
        ax.set_yticks(heights, [row.name for row in self.rows])
        for text, row in zip(ax.get_yticklabels(), self.rows, strict=True):
            text.set_color(INK if row.place is not None else QUIET)
            text.set_fontstyle("normal" if row.place is not None else "italic")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        ax.grid(axis="x", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.set(title=self.title, xlabel="%")
        if self.whole is not None:
            ax.axvline(self.whole, color=QUIET, linewidth=1.2, linestyle=(0, (1, 2)))
        for height, row in zip(heights, self.rows, strict=True):
            if row.mean is None or row.place is None:
                continue
            color = COLOURS[row.place]
            if row.low is not None and row.high is not None:
                ax.plot([row.low, row.high], [height] * 2, color=color, linewidth=1.4)
            ax.plot(row.values, [height] * len(row.values), ".", color=color, markersize=4, alpha=0.55)
            ax.plot([row.mean], [height], MARKERS[row.place], color=color, markersize=6, label=row.flat)
        ax.set_xlim(*self._range())

    def label(self, ax: Axes) -> None:
        """What stands at the right."""
        across = ax.get_yaxis_transform()
        for height, row in zip(ax.get_yticks(), self.rows, strict=True):
            if row.beside:
                ax.text(1.04, height, row.beside, transform=across, va="center", color=INK)
        if self.beside:
            ax.text(1.04, ax.get_ylim()[1], self.beside, transform=across, va="bottom", color=QUIET)

    def _range(self) -> tuple[float, float]:
        """Every seed and mean, and as much of the intervals as leaves the rest readable."""
        values = [value for row in self.rows if row.mean is not None for value in (row.mean, *row.values)]
        ends = [end for row in self.rows for end in (row.low, row.high) if end is not None]
        low, high = min(values, default=0.0), max(values, default=1.0)
        span = (high - low) or 0.1 * abs(high) or 1.0
        low, high = max(min([low, *ends]), low - span), min(max([high, *ends]), high + span)
        return max(0.0, low - 0.05 * span), high + 0.05 * span


def apart(heights: Sequence[float], top: float) -> list[float] | None:
    """Move labels from each other, those given from below to above.

    Args:
        heights: (k,) rising, in points.
        top: Of the axes, in points.

    Returns:
        (k,) heights at least `LINE` apart, or None when one would be further than `SHIFT` from where it belongs.
    """
    steps = LINE * np.arange(len(heights))
    ends = (0.0, top - steps[-1])
    placed = isotonic_regression(np.asarray(heights) - steps, y_min=min(ends), y_max=max(ends)) + steps
    return placed.tolist() if np.abs(placed - heights).max() <= SHIFT else None


def _draw_line(ax: Axes, line: Line, beside: float, seeds: float) -> None:
    """Draw a line with its means moved by `beside` and its seeds by `seeds` more, in log(pairs)."""
    color = COLOURS[line.place]
    pairs = np.array(line.pairs) * np.exp(beside)
    style: dict[str, object] = {"color": color, "linewidth": 1.8, "marker": MARKERS[line.place], "markersize": 5}
    dashes = DASHES[line.place]
    style["linestyle"] = (0, dashes) if dashes else "-"
    ax.plot(pairs, line.means, label=line.name, **style)  # type: ignore[arg-type]
    known = ~np.isnan(line.intervals[:, 0])
    if known.any():
        errors = np.abs(line.intervals[known] - line.means[known, None]).T
        ax.errorbar(pairs[known], line.means[known], errors, fmt="none", ecolor=color, elinewidth=1, capsize=2.5)
    across = np.repeat(pairs * np.exp(seeds), [len(values) for values in line.values])
    ax.plot(across, np.concatenate(line.values), ".", color=color, markersize=3.5, alpha=0.7)


def _drawn(panels: Sequence[Panel]) -> Figure:
    """The panels in rows of at most `BESIDE`."""
    rows = [panels[start : start + BESIDE] for start in range(0, len(panels), BESIDE)]
    heights = [max(panel.size[1] for panel in row) for row in rows]
    widths = [panel.size[0] for panel in rows[0]]
    with rc_context(STYLE):
        whole = Figure(figsize=(sum(widths), sum(heights)), layout="constrained")
        grid = whole.subfigures(len(rows), len(rows[0]), squeeze=False, width_ratios=widths, height_ratios=heights)
        axes: list[Axes] = [part.subplots() for part, _ in zip(grid.flat, panels, strict=False)]
        for panel, ax in zip(panels, axes, strict=True):
            panel.draw(ax)
        whole.draw_without_rendering()
        for panel, ax in zip(panels, axes, strict=True):
            panel.label(ax)
    return whole


def _svg(panel: Panel, name: str) -> Markup:
    """A panel as an SVG element that takes its colors from the page and shares no id with another."""
    file = StringIO()
    with rc_context(STYLE):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        _drawn([panel]).savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", re.sub(r' xmlns(:\w+)?="[^"]*"', "", text))
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: inherit", text)
    text = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 inherit", text)
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(panel.words)}"', 1))


def _labels(pairs: Sequence[int]) -> list[str]:
    """Labels of the ticks; of two that would touch only the first has one."""
    span = np.log(pairs[-1] / pairs[0]) or 1.0
    labels, last = [], -1.0
    for number in pairs:
        place = np.log(number / pairs[0]) / span
        labels.append("" if last >= 0 and place - last < 0.13 else short_count(number))
        last = place if labels[-1] else last
    return labels
