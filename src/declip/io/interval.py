"""The interval of a fraction that was counted."""

from math import sqrt


def wilson_interval(fraction: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a fraction of `n` independent trials (Wilson 1927)."""
    z = 1.96
    scale = 1 + z * z / n
    shifted = fraction + z * z / (2 * n)
    middle = shifted / scale
    variance = fraction * (1 - fraction) / n + z * z / (4 * n * n)
    half = z / scale * sqrt(variance)
    return middle - half, middle + half
