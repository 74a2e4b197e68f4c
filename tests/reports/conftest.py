"""The color model and painted sources of the evaluation's tests, and the views of the report's training pairs."""

from declip.data.plan import Plan, TextSpec, ViewSpec
from declip.recipe.schema import ImageView, TextView
from evaluation.conftest import model, painted

__all__ = ["model", "painted"]


def plan(mean: tuple[float, float, float], std: tuple[float, float, float]) -> Plan:
    """Two augmented image views of 8 pixels and two captions, one of them masked."""
    views = tuple(ViewSpec(name, 8, ImageView()) for name in ("first", "second"))
    return Plan(views, TextSpec(2, TextView(), 0.15), mean, std)
