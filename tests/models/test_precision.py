"""Converted models: what "auto" means on a device, features, identity, and towers that fix a type."""

import pytest
import torch

from conftest import refuses
from declip.models.inference import convert, fingerprint, pick_precision, precision_of, round_taps
from models.test_inference import model_of

CPU = torch.device("cpu")


@pytest.fixture
def computing(monkeypatch):
    """Set the instructions of the CPU; torch emulates bfloat16 where it has none."""
    return lambda **names: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: names)


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [({"avx2": True}, "float32"), ({"avx512_f": True}, "float32"), ({"avx512_bf16": True}, "bfloat16")],
)
def test_auto_is_what_the_processor_computes_itself(computing, instructions, expected):
    computing(**instructions)
    assert pick_precision("auto", CPU) is getattr(torch, expected)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "half"])
def test_emulated_and_unknown_precisions_are_refused(computing, precision):
    computing(avx2=True)
    refuses(rf"{precision}.*auto.*fp32", pick_precision, precision, CPU)


# A tower whose norms are folded, one with norms before its convolutions, one without any.
@pytest.mark.parametrize("tower", ["declip_conv_tiny", "resnetv2_18d", "declip_vit_tiny"])
def test_features_stay_close_and_the_model_the_same(computing, tower):
    computing(avx512_bf16=True)
    model = model_of(tower, 32)
    images, tokens = torch.randn(5, 3, 32, 32), model.tokenize(["red", "a blue circle"])
    encode = [lambda: model.encode_image(images), lambda: model.encode_text(tokens)]
    with torch.no_grad():
        before, identity = [each() for each in encode], fingerprint(model)
        convert(model, "bf16")
        after = [each() for each in encode]
    assert precision_of(model) == "bf16"
    assert model.logit_scale.dtype == torch.float32
    assert fingerprint(model) == identity
    for own, other in zip(before, after, strict=True):
        assert other.dtype == torch.float32
        assert not torch.equal(own, other)
        assert float((own * other).sum(1).min()) > 0.999


class Fixed(torch.nn.Module):
    """A layer that computes in float32 alone, or one that bfloat16 spoils."""

    def __init__(self, spoiled):
        super().__init__()
        self.weight, self.spoiled = torch.nn.Parameter(torch.ones(1)), spoiled

    def forward(self, features):
        if features.dtype == torch.float32:
            return features
        return -features if self.spoiled else torch.dot(features.flatten(), features.float().flatten())


@pytest.mark.parametrize("spoiled", [True, False])
def test_a_tower_that_cannot_be_converted_stays_float32(computing, spoiled):
    computing(avx512_bf16=True)
    models = [model_of("declip_conv_tiny", 32) for _ in range(2)]
    for model in models:
        model.image_tower.proj = torch.nn.Sequential(model.image_tower.proj, Fixed(spoiled))
    assert precision_of(convert(models[0], "auto")) == "fp32"
    assert next(models[0].text_tower.parameters()).dtype == torch.bfloat16
    refuses(r"image tower.*bfloat16.*fp32", convert, models[1], "bf16")


def test_rounded_filters_keep_their_sums():
    torch.manual_seed(0)
    weight = torch.randn(64, 3, 3, 3)
    rounded, nearest = round_taps(weight, torch.bfloat16), weight.bfloat16().float()
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert float((rounded - weight).abs().max()) < 2**-6
    lost = [float((each - weight).sum((2, 3)).abs().mean()) for each in (rounded, nearest)]
    assert lost[0] < lost[1] / 4
