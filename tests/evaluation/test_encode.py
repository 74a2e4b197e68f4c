"""Encoding a source: batches, modes, broken pairs."""

import numpy as np
import pytest
import torch

from conftest import refuses
from declip.evaluation.encode import (
    Batching,
    encode_images,
    encode_source,
    eval_mode,
    text_features,
)
from declip.models.encoder import as_encoder


def test_rows_follow_the_source_and_broken_ones_are_counted(model, painted):
    captions = [("red", "a red thing"), ("green",), ("blue",), ("yellow", "red green")]
    source = painted(["red", "green", "blue", "yellow"], captions, broken=[1])
    found = encode_source(as_encoder(model), source, Batching(2))
    assert found.indices.tolist() == [0, 2, 3]
    assert found.captions == (captions[0], captions[2], captions[3])
    assert found.image_rows.tolist() == [0, 0, 1, 2, 2]
    assert found.skipped.counts == {"truncated image": 1}
    half = 0.5**0.5
    np.testing.assert_allclose(found.images, [[1, 0, 0], [0, 0, 1], [half, half, 0]], atol=1e-6)
    np.testing.assert_allclose(found.texts.norm(dim=1), np.ones(5), atol=1e-6)
    np.testing.assert_allclose(found.texts[4], [half, half, 0], atol=2e-3)


def test_in_batches_in_evaluation_mode_without_gradient(model, painted):
    source = painted(["red"] * 5, [(f"{n}",) for n in range(5)])
    encode_source(as_encoder(model), source, Batching(2))
    assert [(kind, size) for kind, size, _, _ in model.passes] == [
        ("image", 2), ("image", 2), ("image", 1), ("text", 2), ("text", 2), ("text", 1),
    ]  # fmt: skip
    assert not any(training or grad for _, _, training, grad in model.passes)


def test_every_part_gets_its_own_mode_back(model):
    model.train()
    model.frozen.eval()
    with eval_mode(as_encoder(model)) as device:
        assert not model.training
        assert not torch.is_grad_enabled()
        assert device == torch.device("cpu")
    with pytest.raises(KeyError), eval_mode(as_encoder(model)):
        raise KeyError
    assert model.training
    assert not model.frozen.training
    assert torch.is_grad_enabled()


def test_equal_texts_are_encoded_once_and_keep_their_places(model):
    found = text_features(as_encoder(model), ["red", "blue", "red"], Batching(8))
    assert [(kind, size) for kind, size, _, _ in model.passes] == [("text", 2)]
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_workers_change_nothing(model, painted, monkeypatch):
    source = painted(["red", "green", "blue", "cyan", "white"], broken=[3])
    some = encode_images(as_encoder(model), source, indices=[2, 0])
    assert (some.indices.tolist(), some.texts) == ([2, 0], None)
    alone = encode_source(as_encoder(model), source, Batching(2))
    helped = encode_source(as_encoder(model), source, Batching(2, workers=1))
    monkeypatch.setattr("declip.evaluation.encode.READ_AT_ONCE", 1)
    for other in (helped, encode_source(as_encoder(model), source, Batching(2, workers=1))):
        assert torch.equal(alone.images, other.images)
        assert alone.indices.tolist() == other.indices.tolist()
        assert other.skipped.counts == {"truncated image": 1}


def test_nothing_readable(model, painted):
    broken = painted(["red", "red"], broken=[0, 1])
    reason = "'painted'.*2 pairs.*2 × truncated image"
    refuses(reason, encode_source, as_encoder(model), broken, how=Batching(1))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_features_that_are_not_finite_are_refused_by_name(model, painted, value):
    def spoil_blue(encode):
        def spoiled(given):
            features = encode(given)
            return torch.where(features[:, 2:] > 0.9, value, features)

        return spoiled

    model.encode_image, model.encode_text = map(spoil_blue, (model.encode_image, model.encode_text))
    encoder, colors = as_encoder(model), ["red", "green", "red", "blue", "blue"]
    refuses("image features are not finite", encode_source, encoder, painted(colors), Batching(2))
    refuses("text features are not finite", text_features, encoder, colors, Batching(2))
