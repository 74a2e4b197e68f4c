"""Seeing and using a model: vectors of pictures in an index, and searching it."""
