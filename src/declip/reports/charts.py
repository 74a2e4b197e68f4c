"""Line charts as inline SVG: they take their colors from the page, and stay sharp at any width."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

import numpy as np
from markupsafe import Markup, escape

from declip.io.text import percent

POINTS = 240  # of a raw line; each stands for the lowest and highest of its stretch
WIDTH, HEIGHT = 360, 190
WIDE = 390  # of a chart whose lines are labeled at their ends
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 12, 26
LETTER = 7.6  # width of a letter of such a label, roughly
LABEL_GAP = 15  # between the baselines of two such labels


@dataclass(frozen=True)
class Line:
    """A line with its points marked and its name at its end."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class _Frame:
    """Where numbers fall on the drawing."""

    x: tuple[float, float]
    y: tuple[float, float]
    right: float = WIDTH - RIGHT

    def at(self, x: float, y: float) -> tuple[float, float]:
        across = (x - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (y - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return LEFT + across * (self.right - LEFT), HEIGHT - BOTTOM - up * (HEIGHT - BOTTOM - TOP)

    def path(self, xs: Sequence[float] | np.ndarray, ys: Sequence[float] | np.ndarray) -> str:
        """The SVG path through the finite points; a gap where one is not."""
        parts, down = [], False
        for x, y in zip(xs, ys, strict=True):
            if isfinite(y):
                px, py = self.at(x, y)
                parts.append(f"{'L' if down else 'M'}{px:.1f} {py:.1f}")
            down = isfinite(y)
        return "".join(parts)


def term_chart(name: str, steps: np.ndarray, values: np.ndarray, noisy: bool = True) -> Markup:
    """A quantity over the steps; when it is noisy, thin as it was logged and thick smoothed.

    Args:
        name: What it is, for those who cannot see the picture.
        steps: (n,).
        values: (n,); NaN or infinite where there is none.
        noisy: False draws one thick line as it was logged.

    Returns:
        An SVG element.
    """
    finite = np.isfinite(values)
    if not finite.any():
        return Markup('<p class="quiet">Nothing was logged.</p>')
    smooth = smoothed(values) if noisy else values
    low, high = _robust_range(values[finite], smooth[finite])
    ticks = nice_ticks(low, high)
    frame = _Frame((float(steps[0]), float(steps[-1])), (min(low, ticks[0]), max(high, ticks[-1])))
    first, last = smooth[finite][0], smooth[finite][-1]
    words = f"{name}, from {first:.4g} at step {steps[finite][0]:,} to {last:.4g} at step {steps[finite][-1]:,}."
    body = _axes(frame, ticks, _short)
    if noisy:
        raw_x, raw_y = thinned(steps, np.where(finite, np.clip(values, *frame.y), np.nan))
        body += f'<path class="raw" d="{frame.path(raw_x, raw_y)}"/>'
    keep = np.flatnonzero(finite)[np.unique(np.linspace(0, finite.sum() - 1, POINTS).round().astype(int))]
    body += f'<path class="smooth" d="{frame.path(steps[keep], smooth[keep])}"/>'
    return _svg(words, body)


def accuracy_chart(lines: Sequence[Line], chance: float, chance_name: str = "chance") -> Markup:
    """Shares over the steps, with the line of guessing; each line is labeled at its end.

    Args:
        lines: At least one; values are shares between 0 and 1.
        chance: The share that guessing gets.
        chance_name: The label of its line.

    Returns:
        An SVG element.
    """
    top = max(chance, *(value for line in lines for value in line.values))
    ticks = nice_ticks(0, max(top, 1e-3))
    labels = [f"{line.name} {_percent(line.values[-1])}" for line in lines]
    labels.append(f"{chance_name} {_percent(chance)}")
    right = WIDE - 8 - LETTER * max(map(len, labels))
    frame = _Frame((0, max(step for line in lines for step in line.steps)), (0, max(top, ticks[-1])), right)
    body = _axes(frame, ticks, lambda value: f"{100 * value:g} %")
    x0, y0 = frame.at(0, chance)
    body += f'<path class="chance" d="M{x0:.1f} {y0:.1f}H{right:.1f}"/>'
    ends = [(y0, "chance-label", labels[-1])]
    for number, line in enumerate(lines):
        points = [frame.at(*point) for point in zip(line.steps, line.values, strict=True)]
        body += f'<path class="line c{number}" d="{frame.path(line.steps, line.values)}"/>'
        body += "".join(f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points)
        ends.append((points[-1][1], f"end c{number}", labels[number]))
    body += "".join(
        f'<text class="{style}" x="{right + 8:.1f}" y="{y + 4:.1f}">{escape(text)}</text>'
        for y, style, text in _apart(ends)
    )
    words = "; ".join(f"{line.name} from {_percent(line.values[0])} to {_percent(line.values[-1])}" for line in lines)
    return _svg(f"{words}; {labels[-1]}.", body, WIDE)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Running mean over a 15th of the values, with a Gaussian's weights; what is not finite has no weight."""
    sigma = max(1.0, len(values) / 30)
    reach = np.arange(-ceil(3 * sigma), ceil(3 * sigma) + 1)
    kernel = np.exp(-0.5 * (reach / sigma) ** 2)
    finite = np.isfinite(values)
    middle = slice(len(reach) // 2, len(reach) // 2 + len(values))
    total = np.convolve(np.where(finite, values, 0.0), kernel)[middle]
    weight = np.convolve(finite.astype(float), kernel)[middle]
    return np.where(finite, total / np.maximum(weight, 1e-12), np.nan)


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about 2 × `POINTS` points that keep each stretch's lowest and highest value."""
    if len(steps) <= 2 * POINTS:
        return steps, values
    keep: list[int] = []
    for part in np.array_split(np.arange(len(steps)), POINTS):
        good = part[np.isfinite(values[part])]
        if len(good):
            keep += sorted({int(good[values[good].argmin()]), int(good[values[good].argmax()])})
    return steps[keep], values[keep]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** floor(log10(span / count))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor * count >= span * 0.999)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(step * number, 12) for number in range(first, last + 1)]


def _robust_range(raw: np.ndarray, smooth: np.ndarray) -> tuple[float, float]:
    """From lowest to highest, without the rare outliers that would flatten the rest."""
    low, high = np.percentile(raw, [0.5, 99.5])
    return float(min(low, smooth.min())), float(max(high, smooth.max()))


def _axes(frame: _Frame, ticks: Sequence[float], label: Callable[[float], str]) -> str:
    body = ""
    for tick in ticks:
        x, y = frame.at(frame.x[0], tick)
        body += f'<path class="grid" d="M{x:.1f} {y:.1f}H{frame.right:.1f}"/>'
        body += f'<text class="tick y" x="{x - 6:.1f}" y="{y + 4:.1f}">{label(tick)}</text>'
    for tick in (tick for tick in nice_ticks(*frame.x, count=3) if frame.x[0] <= tick <= frame.x[1]):
        x, y = frame.at(tick, frame.y[0])
        body += f'<text class="tick x" x="{x:.1f}" y="{y + 17:.1f}">{_short(tick)}</text>'
    return body


def _apart(ends: list[tuple[float, str, str]]) -> list[tuple[float, str, str]]:
    """Move labels from each other, those below downwards first and then all up into the drawing."""
    placed: list[tuple[float, str, str]] = []
    for y, style, text in sorted(ends):
        y = max(y, placed[-1][0] + LABEL_GAP) if placed else max(y, TOP)
        placed.append((y, style, text))
    limit = HEIGHT - BOTTOM + 4.0
    moved = []
    for y, style, text in reversed(placed):
        moved.append((min(y, limit), style, text))
        limit = moved[-1][0] - LABEL_GAP
    return moved


def _svg(words: str, body: str, width: int = WIDTH) -> Markup:
    return Markup(f'<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{escape(words)}">{body}</svg>')


def _percent(share: float) -> str:
    return percent(share).replace(" ", "\N{NO-BREAK SPACE}")


def _short(value: float) -> str:
    """1500 is "1.5k", 2,000,000 is "2M"."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"
