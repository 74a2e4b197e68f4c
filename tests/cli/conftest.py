"""The exports of a fit are left out, as in the tests of training."""

from training.conftest import without_exports

__all__ = ["without_exports"]
