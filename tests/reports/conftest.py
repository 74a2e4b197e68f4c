"""The color model and painted sources of the evaluation's tests."""

from evaluation.conftest import model, painted

__all__ = ["model", "painted"]
