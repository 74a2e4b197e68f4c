"""What the Python functions accept: images, files and arrays, texts, runs; and what they say of anything else."""

import numpy as np
import pytest
import torch

import declip
from conftest import draw, refuses, tiny_tree
from declip.recipe.schema import Recipe
from indices import model

__all__ = ["model"]
PICTURE = draw("red", "circle")
PIXELS = np.asarray(PICTURE)
IMAGES = {
    "image": PICTURE,
    "array": PIXELS,
    "arrays": np.stack([PIXELS]),
    "name": "a.png",
    "names": ["a.png"],
}
WRONG = {
    "no file": ("b.png", "b.png"),
    "text file": ("a.txt", "a.txt"),
    "floats": (PIXELS / 255, "float64 (40, 40, 3)"),
    "number": (3, "int"),
    "none": (None, "NoneType"),
    "tensor of one image": (torch.zeros(3, 32, 32), "(3, 32, 32)"),
    "tensor of bytes": (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "uint8"),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("a.png")
    (tmp_path / "a.txt").write_text("I am text")


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    recipe = Recipe.model_validate(tiny_tree(table))
    return declip.train(recipe, out=tmp_path_factory.mktemp("run"), progress=False, report=False)


@pytest.mark.parametrize("name", IMAGES)
def test_images(model, name):
    expected = model.preprocess([PICTURE])
    assert torch.equal(model.preprocess(IMAGES[name]), expected)
    assert torch.equal(model.encode_image(IMAGES[name]), model.encode_image(expected))
    assert torch.equal(model.encode_backbone(IMAGES[name]), model.encode_backbone(expected))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_image(model, name):
    given, named = WRONG[name]
    refuses([named], model.encode_image, given)


def test_texts(model):
    expected = model.encode_text(model.tokenize(["one", "two of it"]))
    assert torch.equal(model.encode_text(["one", "two of it"]), expected)
    torch.testing.assert_close(model.encode_text("one"), expected[:1])
    for wrong, named in (
        (3, "int"),
        (None, "NoneType"),
        ([b"x"], "bytes"),
        (torch.zeros(3).long(), "(3,)"),
    ):
        refuses([named], model.encode_text, wrong)


def test_features_have_gradients_in_training_only(model):
    for train in (False, True):
        model.train(train)
        features = (
            model.encode_image(PICTURE),
            model.encode_backbone(PICTURE),
            model.encode_text("one"),
        )
        assert [each.requires_grad for each in features] == [train] * 3
    model.eval().encode_image("a.png").numpy()


def test_a_run_is_a_model(run, table):
    expected = declip.load(run.folder).encode_text("a red circle")
    assert torch.equal(declip.load(run).encode_text("a red circle"), expected)
    result = declip.evaluate(run, table, "retrieval", progress=False)
    assert result == declip.evaluate(run.folder, table, "retrieval", progress=False)
    index = declip.embed(run, table, out="index", workers=0)
    assert declip.Index("index").info.model.fingerprint == index.info.model.fingerprint
    declip.export(run, "safetensors", "exported")
    refuses(["int", "run folder"], declip.evaluate, 3, table, "retrieval")
