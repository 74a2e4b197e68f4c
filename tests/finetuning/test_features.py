"""Features of frozen towers on disk: found again, computed again when something changed, shared by processes."""

import shutil
import sqlite3

import pytest
import torch
from PIL import Image

import declip
from conftest import TINY, read_only, refuses
from declip.data.images.decode import LazyJpeg
from declip.data.sources.open import open_source
from declip.evaluation.encode import encode_source
from declip.finetuning.features import FILE, FrozenEncoder, PooledFeatures, compute_features, text_key
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower
from declip.recipe.schema import Recipe


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


def test_evaluation_computes_the_towers_once(start, monkeypatch):
    model = declip.load(start, device="cpu")
    encoder = FrozenEncoder(model)
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
    encoder, images = FrozenEncoder(declip.load(start, device="cpu"), "bf16"), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        exact, rounded = encoder.pool_images(images), encoder.pool_fitted(images)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_heads_are_fitted_to_images_as_a_search_reads_them(start, precision, tmp_path, monkeypatch):
    Image.radial_gradient("L").resize((900, 700)).convert("RGB").save(tmp_path / "circle.jpg")
    (tmp_path / "circle.txt").write_text("a circle")
    encoder, source, given = FrozenEncoder(declip.load(start, device="cpu"), precision), open_source(tmp_path), []
    monkeypatch.setattr(encoder, "pool_fitted", lambda pixels: given.append(pixels) or torch.zeros(1, 4))
    decode, scales = LazyJpeg.pixels, []
    monkeypatch.setattr(LazyJpeg, "pixels", lambda self, scale=1: scales.append(scale) or decode(self, scale))
    features = compute_features(encoder, source, Recipe.model_validate(TINY), shown=False)
    assert (len(features.pairs.images), scales) == (1, [8])  # of a photograph no more is decoded than the tower sees
    of = encoder.preprocessor
    fast = of.fast(source.lazy_image(0))[None]
    assert not torch.equal(of(source.image(0)), of.normalize(fast))
    assert torch.equal(given[0], fast)


def test_a_source_is_read_once_for_all_projections(start):
    pairs = [(Image.new("RGB", (40, 40), color), color) for color in ("red", "green", "blue")]
    model, source = declip.load(start, device="cpu"), open_source(pairs)
    encoder = FrozenEncoder(model)
    encode_source(encoder, source)
    model.image_tower.proj.weight.data.mul_(-1)
    expected = encode_source(model, source)
    pairs[0][0].paste("white", (0, 0, 40, 40))
    assert not torch.equal(encode_source(model, source).images, expected.images)
    features = encode_source(encoder, source)
    torch.testing.assert_close(features.images, expected.images)
    assert (features.captions, features.texts.shape) == (expected.captions, expected.texts.shape)


def test_features_of_other_towers_and_versions_are_computed_again(cache, monkeypatch):
    def stores(activation="gelu", weight=0.1):
        """The folders of both towers."""
        torch.manual_seed(0)
        model = DualEncoder.from_recipe(
            Recipe.model_validate({**TINY, "text": {**TINY["text"], "activation": activation}})
        )
        torch.nn.init.constant_(model.text_tower.token_embedding.weight, weight)
        before = {path.name for path in cache.glob("*")}
        FrozenEncoder(model)
        return {path.name for path in cache.glob("*")} - before

    assert (len(stores()), len(stores())) == (2, 0)
    assert (len(stores("quick_gelu")), len(stores(weight=0.5))) == (1, 1), "the image tower is the same"
    versions = "torch.__version__", "timm.__version__", "PIL.__version__"
    for name in (*versions, "declip.finetuning.features.FEATURE_VERSION"):
        with monkeypatch.context() as patch:
            patch.setattr(name, "another")
            assert len(stores()) == 2, name


@pytest.mark.parametrize("padding", [0, 1, 49])
def test_a_caption_has_one_key_for_every_padded_length(padding):
    ids = [5, 0, 1, 49, 7]
    keys = {text_key(torch.tensor(ids + [padding] * count), padding) for count in (0, 1, 9)}
    assert len(keys) == 1
    assert text_key(torch.tensor([*ids, 8]), padding) not in keys


def test_processes_share_features_and_a_kill_loses_nothing(tmp_path):
    inputs, pool = torch.tensor([[1], [2], [1]]), lambda rows: rows.float().expand(-1, 2)
    first, second = (PooledFeatures(tmp_path, lambda row: bytes([row.item()]) * 16, pool) for _ in range(2))
    assert first.of(inputs).tolist() == [[1, 1], [2, 2], [1, 1]]
    with sqlite3.connect(tmp_path / FILE) as file:  # as a killed process leaves it
        file.execute("DELETE FROM features WHERE key = ?", (bytes([2]) * 16,))
    second.pool = lambda rows: 10 * rows.float().expand(-1, 2)
    assert second.of(inputs).tolist() == [[1, 1], [20, 20], [1, 1]]
    assert first.of(inputs).tolist() == [[1, 1], [20, 20], [1, 1]]


def features(folder):
    return PooledFeatures(folder, lambda row: bytes([row.item()]) * 16, lambda rows: rows.float())


def test_a_run_keeps_its_features_and_goes_on_without_them(cache, command):
    store, inputs = features(cache / "a"), torch.tensor([[1], [2]])
    assert store.of(inputs).tolist() == [[1], [2]]
    assert (command("cache", "clear").out.split()[0], (cache / "a" / FILE).exists()) == ("0.0", True)
    shutil.rmtree(cache)
    assert store.of(inputs).tolist() == [[1], [2]]


def test_a_read_only_cache_is_read_and_named_if_it_lacks_features(cache):
    features(cache).of(torch.tensor([[1], [2]]))

    def work():
        store = PooledFeatures(cache, lambda row: bytes([row.item()]) * 16, None)
        assert store.of(torch.tensor([[2], [1]])).tolist() == [[2.0], [1.0]]
        store.pool = torch.clone
        refuses("The features in .*DECLIP_CACHE", store.of, torch.tensor([[3]]))

    read_only(cache, work)


def test_a_full_disk_or_a_damaged_file_is_named(tmp_path):
    store = features(tmp_path)
    (tmp_path / FILE).write_bytes(b"spoiled" * 1000)
    refuses("DECLIP_CACHE", store.of, torch.tensor([[1]]))
