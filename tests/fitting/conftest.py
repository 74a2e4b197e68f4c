"""A run to start from, as in the tests of training; the exports of a fit are left out."""

from training.conftest import start, without_exports

__all__ = ["start", "without_exports"]
