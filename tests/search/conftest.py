"""Fixtures of tests of indices."""

from indices import command, folder, model, weights_file

__all__ = ["command", "folder", "model", "weights_file"]
