"""Checks of numbers that a user sets, all with one wording."""

import math
from collections.abc import Sequence

from declip.errors import UserError


def check_range(name: str, value: float, low: float, high: float = math.inf) -> None:
    """Raise a `UserError` unless `low <= value <= high`; NaN and infinity are refused too."""
    if not (math.isfinite(value) and low <= value <= high):
        raise UserError(f"{name} is {value}; it must be {_allowed(low, high)}.")


def check_span(name: str, span: Sequence[float], low: float, high: float = math.inf) -> None:
    """Raise a `UserError` unless `span` is two numbers with `low < span[0] <= span[1] <= high`."""
    finite = len(span) == 2 and all(map(math.isfinite, span))
    if not (finite and low < span[0] <= span[1] <= high):
        allowed = f"above {low:g}" + ("" if math.isinf(high) else f" and at most {high:g}")
        raise UserError(f"{name} is {list(span)}; it must be two numbers, {allowed}, the smaller one first.")


def _allowed(low: float, high: float) -> str:
    return f"{low:g} or more" if math.isinf(high) else f"between {low:g} and {high:g}"
