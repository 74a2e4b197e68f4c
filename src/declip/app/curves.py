"""Curves with few enough points to draw, whatever a run has logged."""

import numpy as np

MOST_POINTS = 240
"""Of a line: more than the pixels that one of the page's charts has for it."""


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST_POINTS) -> list[tuple[int, float]]:
    """A line of at most `most` points.

    Neighboring rows are put together, as many for each point, and stand for their means; the last row stays as it
    is, so that the end of the line is what was logged last. Rows that are no number are left out.

    Args:
        steps: (n,) rising.
        values: (n,) float.
        most: Points, two or more.
    """
    known = np.isfinite(values)
    steps, values = steps[known], values[known]
    if len(values) <= most:
        return [(int(step), float(value)) for step, value in zip(steps, values, strict=True)]
    ends = np.linspace(0, len(values) - 1, most).round().astype(np.int64)
    sizes = np.diff(ends)
    points = zip(
        np.add.reduceat(steps[:-1].astype(np.float64), ends[:-1]) / sizes,
        np.add.reduceat(values[:-1], ends[:-1]) / sizes,
        strict=True,
    )
    return [*((round(step), float(value)) for step, value in points), (int(steps[-1]), float(values[-1]))]
