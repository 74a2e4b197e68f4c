"""Features of frozen towers on disk: found again, computed again when something changed, shared by processes."""

import errno
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import declip
from conftest import TINY
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower
from declip.recipe.schema import Recipe
from declip.training.frozen_encoder import FeatureStore, FrozenEncoder, text_key


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
    read_keys = Mock()
    monkeypatch.setattr("declip.training.frozen_encoder.FeatureStore.refresh", read_keys)
    look()
    assert not read_keys.called, "the keys are read once, not for every batch"


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
    for name in (
        *("torch.__version__", "timm.__version__", "PIL.__version__"),
        "declip.training.frozen_encoder.FEATURE_VERSION",
    ):
        with monkeypatch.context() as patch:
            patch.setattr(name, "another")
            assert len(stores()) == 2, name


@pytest.mark.parametrize("padding", [0, 1, 49])
def test_a_caption_has_one_key_for_every_padded_length(padding):
    ids = [5, 0, 1, 49, 7]
    keys = {text_key(torch.tensor(ids + [padding] * count), padding) for count in (0, 1, 9)}
    assert len(keys) == 1
    assert text_key(torch.tensor([*ids, 8]), padding) not in keys


def test_a_store_reads_only_the_keys_that_another_process_appended(tmp_path):
    first, second = (FeatureStore(tmp_path, 1, torch.float32) for _ in range(2))
    keys = [bytes([number]) * 16 for number in range(4)]
    first.append(keys[:2], torch.tensor([[0.0], [1.0]]))
    assert keys[0] not in second
    second.refresh()
    second.append(keys[2:], torch.tensor([[2.0], [3.0]]))
    with (tmp_path / "keys").open("r+b") as file:  # keys that were read once are not read again
        file.write(bytes(16))
    first.refresh()
    assert first.rows()[first.places(keys)].squeeze(1).tolist() == [0, 1, 2, 3]


def test_a_full_disk_or_a_kill_loses_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "full")

    store, key = FeatureStore(tmp_path, 2, torch.float32), b"b" * 16
    store.append([b"a" * 16], torch.ones(1, 2))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(UserError, match="DECLIP_CACHE"):
            store.append([key], torch.zeros(1, 2))
    assert key not in store
    store.append([key], torch.full((1, 2), 3.0))
    with (tmp_path / "keys").open("r+b") as file:  # as after a kill: the last row was written, its key was not
        file.truncate(16 + 5)
    store = FeatureStore(tmp_path, 2, torch.float32)
    assert key not in store
    store.append([key], torch.full((1, 2), 4.0))
    assert FeatureStore(tmp_path, 2, torch.float32).rows().tolist() == [[1, 1], [4, 4]]
