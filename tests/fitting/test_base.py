"""The base of a fit: features of frozen towers are computed once, and again when something changed."""

import pytest
import torch
from PIL import Image

import declip
from conftest import TINY
from declip.closed_form.heads import Heads
from declip.data.images.decode import LazyJpeg
from declip.data.sources.open import open_source
from declip.evaluation.encode import encode_source
from declip.fitting.adapted import Adapted
from declip.fitting.base import Base
from declip.fitting.pairs import read_features
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower
from declip.recipe.schema import Recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def test_evaluation_computes_the_towers_once(start, monkeypatch):
    model = declip.load(start, device="cpu")
    encoder = Adapted(Base(model, projected=True), None, 10.0)
    images, tokens = torch.randn(3, 3, 32, 32), model.tokenize(["a red circle", "a square"])
    expected = model.encode_image(images), model.encode_text(tokens)

    def look():
        with torch.no_grad():
            torch.testing.assert_close(encoder.encode_image(images), expected[0])
            torch.testing.assert_close(encoder.encode_text(tokens), expected[1])

    look()
    monkeypatch.setattr(ImageTower, "pool", None)
    look()


def test_heads_are_fitted_in_the_precision_of_training(start):
    base = Base(declip.load(start, device="cpu"), precision="bf16")
    images = torch.randn(3, 3, 32, 32)
    exact, rounded = base.pool_exact(images), base.pool_images(images)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_heads_are_fitted_to_images_as_a_search_reads_them(start, precision, tmp_path, monkeypatch):
    Image.radial_gradient("L").resize((900, 700)).convert("RGB").save(tmp_path / "circle.jpg")
    (tmp_path / "circle.txt").write_text("a circle")
    base = Base(declip.load(start, device="cpu"), precision=precision)
    source, given = open_source(tmp_path), []
    monkeypatch.setattr(
        base, "pool_images", lambda pixels: given.append(pixels) or torch.zeros(1, 4)
    )
    decode, scales = LazyJpeg.pixels, []
    monkeypatch.setattr(
        LazyJpeg, "pixels", lambda self, scale=1: scales.append(scale) or decode(self, scale)
    )
    features = read_features(source, base, 0.05)
    assert (len(features.pairs.images), scales) == (
        1,
        [8],
    )  # of a photograph no more is decoded than the tower sees
    of = base.model.preprocessor
    fast = of.fast(source[0].open())[None]
    assert not torch.equal(of(source[0].open().decoded()), of.normalize(fast))
    assert torch.equal(given[0], fast)


def test_a_source_is_read_once_for_all_heads(start):
    pairs = [(Image.new("RGB", (40, 40), color), color) for color in ("red", "green", "blue")]
    model, source = declip.load(start, device="cpu"), open_source(pairs)
    expected = encode_source(model, source)
    base = Base(model, projected=True)
    encode_source(Adapted(base, None, 10.0), source)
    pairs[0][0].paste("white", (0, 0, 40, 40))
    assert not torch.equal(encode_source(model, source).images, expected.images)
    width = expected.images.shape[1]
    reversed_heads = Heads(-torch.eye(width), torch.eye(width))
    features = encode_source(Adapted(base, reversed_heads, 10.0), source)
    torch.testing.assert_close(features.images, -expected.images)
    assert (features.captions, features.texts.shape) == (expected.captions, expected.texts.shape)


def test_features_of_other_towers_and_versions_are_computed_again(cache, monkeypatch):
    def stores(activation="gelu", weight=0.1):
        """The folders of both towers."""
        torch.manual_seed(0)
        model = DualEncoder(
            Recipe.model_validate({**TINY, "text": {**TINY["text"], "activation": activation}})
        )
        torch.nn.init.constant_(model.text_tower.token_embedding.weight, weight)
        before = {path.name for path in cache.glob("*")}
        Base(model)
        return {path.name for path in cache.glob("*")} - before

    assert (len(stores()), len(stores())) == (2, 0)
    assert (len(stores("quick_gelu")), len(stores(weight=0.5))) == (1, 1), (
        "the image tower is the same"
    )
    for library in ("torch", "timm", "pillow"):
        with monkeypatch.context() as patch:
            patch.setattr(
                "declip.fitting.base.version", lambda name, other=library: f"{name == other}"
            )
            assert len(stores()) == 2, library
