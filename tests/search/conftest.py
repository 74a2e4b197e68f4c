"""Fixtures of tests of indices."""

from indices import built_in, explained, folder, model, weights_file

__all__ = ["built_in", "explained", "folder", "model", "weights_file"]
