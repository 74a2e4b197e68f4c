"""Fixtures of tests of indices."""

from indices import folder, model, weights_file

__all__ = ["folder", "model", "weights_file"]
