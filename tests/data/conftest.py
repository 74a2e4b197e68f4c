"""What tests of data share: a folder of pictures, a folder of shards, a cache of their own."""

import numpy as np
import pytest
from PIL import Image

from data.fakes import SIZES, write_shards


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where everything is cached, empty at first."""
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """A folder with a.png, b.png and c.png, of 3 by 2 pixels; every value of a is 0, of b 1, of c 2."""
    for value, name in enumerate("abc"):
        Image.fromarray(np.full((2, 3, 3), value, np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


@pytest.fixture
def shard_folder(tmp_path):
    """Four shards of `SIZES` pairs."""
    return write_shards(tmp_path / "shards", SIZES)
