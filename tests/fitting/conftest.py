"""A run to start from, as in the tests of training."""

from training.conftest import start

__all__ = ["start"]
