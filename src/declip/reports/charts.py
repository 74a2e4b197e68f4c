"""Charts: matplotlib figures as inline SVG that uses the colors of the page, light or dark."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from textwrap import shorten
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.ndimage import uniform_filter1d

from declip.io.text import percent, short_count

INK = "#1c2127"
QUIET = "#5b6470"
RULE = "#d9d5cc"
COLORS = (INK, "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")
"""Okabe and Ito's palette, which color-blind readers can distinguish; the baseline is black."""

MARKERS = "so^DvP"
DASHES = ("--", "-", ":", "-.")
DOTTED = (0, (1, 2))
CHANCE: Any = {"color": QUIET, "linewidth": 1.3, "linestyle": DOTTED, "label": "chance"}

VARIABLES = {color: f"--series-{number}" for number, color in enumerate(COLORS)}
VARIABLES |= {INK: "--ink", QUIET: "--quiet", RULE: "--line"}
"""The CSS variable of each color, which the dark page overrides."""

STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
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
    "path.simplify_threshold": 1,  # keeps a long noisy line at about 20 kB, for any number of steps
}
LEGEND_LETTERS = 24

Lines = Mapping[str, Sequence[float]]  # values over the steps, by name


@dataclass(frozen=True)
class Chart:
    """A figure of one panel: its text alternative, its size in inches, and its drawing function."""

    words: str
    size: tuple[float, float]
    draw: Callable[[Axes], None]

    def figure(self) -> Figure:
        """Draw the figure, in the style of the present context."""
        figure = Figure(figsize=self.size, layout="constrained")
        self.draw(figure.subplots())
        return figure

    def svg(self, name: str) -> Markup:
        """Render as an SVG element whose ids start with `name`, unique on the page."""
        # Of the file only the drawing is kept: the page sets size, fonts and colors.
        file = StringIO()
        with rc_context(STYLE):
            self.figure().savefig(file, format="svg", transparent=True)
        text = file.getvalue()
        view = re.search(r'viewBox="[^"]*"', text)
        text = text[text.index("<defs>") :]
        # The whole page's
        text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
        text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
        text = re.sub(r"font: ([^;\"]*?px) [^;\"]*", r"font: \1 inherit", text)
        for color, variable in VARIABLES.items():
            text = text.replace(color, f"var({variable})")
        return Markup(
            f'<svg role="img" aria-label="{escape(self.words)}" {view and view[0]}>{text}'
        )


def value_chart(
    name: str, steps: np.ndarray, values: np.ndarray, noisy: bool = True
) -> Chart | None:
    """Draw a quantity, (n,), over the steps: thin as logged and, if noisy, thick smoothed; None if none is finite."""
    finite = np.isfinite(values)
    if not finite.any():
        return None
    # Rare outliers would flatten the rest of the curve.
    low, high = np.percentile(values[finite], [0.5, 99.5])
    smooth = values
    if noisy:
        smooth = smoothed(np.where(finite, values.clip(low, high), np.nan))
    low = min(low, smooth[finite].min())
    high = max(high, smooth[finite].max())
    color = COLORS[1]

    def draw(ax: Axes) -> None:
        if noisy:
            logged = np.where(finite, values, np.nan)
            ax.plot(steps, logged, color=color, linewidth=0.6, alpha=0.45)
        shape = "o" if finite.sum() == 1 else "-"
        style: Any = {"color": color, "linewidth": 1.9, "markersize": 4}
        ax.plot(steps, smooth, shape, label=name, **style)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        ax.set_ylim(low - margin, high + margin)
        if len(steps) > 1:
            ax.set_xlim(steps[0], steps[-1])
        _over_steps(ax)

    first, last = np.flatnonzero(finite)[[0, -1]]
    words = f"{name}, from {smooth[first]:.4g} at step {steps[first]:,} to {smooth[last]:.4g} at step {steps[last]:,}."
    return Chart(words, (3.3, 1.75), draw)


def score_chart(lines: Lines, steps: Sequence[int], chance: float) -> Chart:
    """Draw fractions over the steps, in %, with the chance level."""
    top = 100 * max(chance, *map(max, lines.values()), 1e-3)

    def draw(ax: Axes) -> None:
        ax.axhline(100 * chance, **{**CHANCE, "label": f"chance {percent(chance)}"})
        for color, (name, values) in zip(COLORS[1:], lines.items()):  # noqa: B905
            label = f"{name} {percent(values[-1])}"
            style: Any = {"color": color, "linewidth": 1.8, "markersize": 3.5}
            ax.plot(steps, 100 * np.array(values), "o-", label=label, **style)
        ax.set_ylim(0, 1.06 * top)
        ax.set_xlim(left=0)
        _over_steps(ax)
        ax.yaxis.set_major_formatter("{x:g} %")
        legend(ax)

    words = "; ".join(
        f"{name} from {percent(line[0])} to {percent(line[-1])}" for name, line in lines.items()
    )
    return Chart(f"{words}; chance {percent(chance)}.", (4.2, 2.4), draw)


def growth_chart(growth: Mapping[str, Any]) -> Chart:
    """Draw the percentile with parts of the pairs; the band is that of the intervals."""
    color = COLORS[1]
    pairs = growth["pairs"]
    rows = growth["measured"]
    values = 100 * np.array([row["value"] for row in rows])
    low = 100 * np.array([row["low"] for row in rows])
    high = 100 * np.array([row["high"] for row in rows])

    def draw(ax: Axes) -> None:
        ax.fill_between(pairs, low, high, color=color, alpha=0.15, linewidth=0)
        ax.plot(pairs, values, "o-", color=color, linewidth=1.8, markersize=4)
        ax.axhline(50, color=QUIET, linewidth=0.8)
        ax.text(pairs[0], 50.5, "chance", color=QUIET, va="bottom")
        over_pairs(ax, pairs)
        ax.set(xlabel="pairs", ylim=(min(45, low.min()), 100))
        ax.yaxis.set_major_formatter("{x:g} %")

    words = f"Better than {percent(rows[-1]['value'])} of the others, with {pairs[-1]:,} pairs."
    return Chart(words, (4.2, 2.8), draw)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a 15th of the values, applied three times; non-finite values have no weight."""
    finite = np.isfinite(values)
    sums = np.stack([np.where(finite, values, 0.0), finite])
    for _ in range(3):  # nearly a Gaussian filter, in linear time
        sums = uniform_filter1d(sums, max(3, len(values) // 15), mode="constant")
    means = sums[0] / np.maximum(sums[1], 1e-12)
    return np.where(finite, means, np.nan)


def legend(ax: Axes) -> None:
    handles, names = ax.get_legend_handles_labels()
    shown = [" " + shorten(name, LEGEND_LETTERS, placeholder=" …") for name in names]
    longest = max(map(len, shown))
    columns = 1
    if longest <= LEGEND_LETTERS - 3:
        columns = 2
    ax.figure.legend(
        handles, shown, loc="outside lower left", ncols=columns, columnspacing=1, frameon=False
    )


def over_pairs(ax: Axes, pairs: Sequence[int]) -> None:
    ax.set_xscale("log")
    ax.set_xticks(list(pairs), [short_count(number) for number in pairs])
    ax.set_xticks([], minor=True)
    ax.grid(axis="y")


def _over_steps(ax: Axes) -> None:
    ax.grid(axis="y")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.xaxis.set_major_formatter(lambda value, _: short_count(round(value)))
