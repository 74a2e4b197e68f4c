"""Fixtures of tests of indices."""

import pytest

import declip
from indices import built_in, explained, folder, model, weights_file

__all__ = ["built_in", "explained", "folder", "model", "weights_file"]


@pytest.fixture
def embed(model, tmp_path):
    """Embeds a source into an index in the test's folder."""
    return lambda source, name="index", **options: declip.embed(
        model, source, out=tmp_path / name, **options
    )
