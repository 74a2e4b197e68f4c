"""A tiny model with random weights, a folder of images without captions, and indices of made-up vectors."""

from itertools import product

import pytest
import torch

import declip
from conftest import COLORS, SHAPES, draw, once, tiny_tree
from declip.data.pair import Origin
from declip.interchange import starter
from declip.interchange.declip_file import write_declip_file
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.search.index import Index
from declip.search.info import IndexInfo, ModelInfo, SourceInfo
from declip.search.store import Block, IndexedImage
from declip.search.writer import new_index

START = "builtin:lite0-minilm"


def tiny_model(seed=0):
    torch.manual_seed(seed)
    return DualEncoder(Recipe.model_validate(tiny_tree("unused"))).eval()


def write_index(folder, images, texts=None, captions=()):
    """An index of vectors that no model made, written in blocks of 500 rows; an empty caption means none."""
    made_by = ModelInfo(path="", name="no model", fingerprint="0" * 64)
    source = SourceInfo(path="", name="made up")
    captions = captions or [f"caption {n}" for n in range(len(images))]
    wanted = IndexInfo(model=made_by, source=source, dtype="float32", captions=texts is not None)

    def blocks():
        for ids in torch.arange(len(images)).split(500):
            rows = [
                IndexedImage(n, f"key {n}", (captions[n],) if captions[n] else (), n, Origin())
                for n in ids.tolist()
            ]
            yield Block.of(rows, images[ids], None if texts is None else texts[ids], "float32")

    with new_index(folder, wanted) as writer:
        for block in blocks():
            writer.add(block)
    return Index.open(folder)


@pytest.fixture(scope="session")
def model():
    return tiny_model()


def draw_shapes(folder):
    """Write 24 images into a new folder; their paths in order."""
    folder.mkdir()
    for color, shape in product(COLORS, SHAPES):
        draw(color, shape).save(folder / f"{color}-{shape}.png")
    return sorted(folder.iterdir())


@pytest.fixture
def folder(tmp_path):
    draw_shapes(tmp_path / "shapes")
    return tmp_path / "shapes"


@pytest.fixture(scope="session")
def weights_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    write_declip_file(model, path)
    return path


@pytest.fixture(scope="session")
def built_in():
    """The smaller built-in start."""
    if not starter.installed(START):
        pytest.skip("the built-in start is not installed")
    return declip.load(START)


@pytest.fixture(scope="session")
def explained(built_in, tmp_path_factory):
    """An index of 24 drawings whose hits say what they resemble."""

    def make(folder):
        draw_shapes(folder / "shapes")
        declip.embed(START, folder / "shapes", out=folder / "index")

    folder = once(tmp_path_factory, "explained", make)
    return declip.Index.open(folder / "index", model=built_in)
