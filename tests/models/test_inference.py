"""Image towers without gradients: folded norms, converted models, features and identity."""

import pytest
import torch

from conftest import Lazy, refuses, tiny_tree
from declip.models import device, inference
from declip.models.dual_encoder import DualEncoder
from declip.models.fingerprint import fingerprint
from declip.models.folding import inference_tower
from declip.models.inference import chunked, compiled_encoder, image_encoder
from declip.models.precision import convert, pick_precision, precision_of
from declip.recipe.schema import Recipe

testing = Lazy("torch._dynamo.testing")


def model_of(tower, size, **options):
    torch.manual_seed(0)
    tree = tiny_tree("unused", image={"model": tower, "size": size, "model_kwargs": options})
    model = DualEncoder(Recipe.model_validate(tree))
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # statistics that change something
            if "running" in name:
                buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.uniform_(-0.1, 0.1)
    return model.eval()


# The second is the built-in start's tower, the third has norms before convolutions, the last has no batch norm.
@pytest.mark.parametrize(
    ("tower", "size"),
    [
        ("declip_conv_tiny", 32),
        ("tf_efficientnet_lite0", 64),
        ("resnetv2_18d", 32),
        ("declip_vit_tiny", 32),
    ],
)
def test_features_are_those_of_the_model(tower, size):
    model = model_of(tower, size)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(9, 3, size, size)
    with torch.no_grad():
        expected = model.encode_image(images)
        assert float(expected.std(dim=0).mean()) > 1e-3, "the images differ"
        torch.testing.assert_close(image_encoder(model)(images), expected, rtol=0, atol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_batch_norm_is_folded_into_the_convolutions():
    model = model_of("tf_efficientnet_lite0", 64)
    towers = (model.image_tower, inference_tower(model))
    norms = [sum(hasattr(m, "running_mean") for m in tower.modules()) for tower in towers]
    assert norms[0] > 40
    assert norms[1] == 0
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        own, folded = (
            torch.nn.functional.normalize(tower(images).pooled, dim=1) for tower in towers
        )
    torch.testing.assert_close(folded, own, rtol=0, atol=1e-4)


class Swapped(torch.nn.Module):
    """A norm that is made after a convolution, and applied before it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)
        torch.nn.init.uniform_(self.norm.running_mean)

    def forward(self, images):
        return self.conv(self.norm(images))


def test_a_norm_before_its_convolution_is_not_folded():
    model = model_of("declip_conv_tiny", 32)
    model.image_tower.trunk.stem = torch.nn.Sequential(
        Swapped(), model.image_tower.trunk.stem
    ).eval()
    assert inference_tower(model) is model.image_tower


CPU = torch.device("cpu")


@pytest.fixture
def computing(monkeypatch):
    """Set the instructions of the CPU; torch emulates bfloat16 where it has none."""
    return lambda **names: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: names)


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ({"avx2": True}, "float32"),
        ({"avx512_f": True}, "float32"),
        ({"avx512_bf16": True}, "bfloat16"),
    ],
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
    images, tokens = torch.randn(2, 3, 32, 32), model.tokenize(["red", "a blue circle"])
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
        return (
            -features if self.spoiled else torch.dot(features.flatten(), features.float().flatten())
        )


@pytest.mark.parametrize("spoiled", [True, False])
def test_a_tower_that_cannot_be_converted_stays_float32(computing, spoiled):
    computing(avx512_bf16=True)
    models = [model_of("declip_conv_tiny", 32) for _ in range(2)]
    for model in models:
        model.image_tower.proj = torch.nn.Sequential(model.image_tower.proj, Fixed(spoiled))
    assert precision_of(convert(models[0], "auto")) == "fp32"
    assert next(models[0].text_tower.parameters()).dtype == torch.bfloat16
    refuses(r"image tower.*bfloat16.*fp32", convert, models[1], "bf16")


def test_images_are_encoded_a_few_at_a_time():
    images, seen = torch.arange(30.0).view(30, 1, 1, 1).expand(30, 3, 256, 256), []

    def encode(part):
        seen.append(len(part))
        return part[:, :, 0, 0]

    found = chunked(encode, images)
    assert torch.equal(found, images[:, :, 0, 0])
    most = 4 * torch.get_num_threads()
    assert seen[0] == min(most, 30)
    assert sum(seen) == 30


@pytest.fixture
def compiling(monkeypatch):
    """Compile also on the CPU, from three images on."""
    monkeypatch.setattr(device, "COMPILED_ON", ("cpu",))
    monkeypatch.setattr(inference, "COMPILE_FROM", 3)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SMALL = {"depths": [1, 1, 1, 1], "width_factor": 1 / 8}


# A tower of the kind of the built-in start, and CLIP's ResNet
@pytest.mark.parametrize(
    ("tower", "options"), [("test_efficientnet", {}), ("resnet50_clip", SMALL)]
)
def test_a_compiled_tower_is_one_graph_with_the_same_features(compiling, tower, options):
    model = model_of(tower, 64, **options)
    counter = testing.CompileCounterWithBackend("aot_eager")
    pixels = torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        encode = compiled_encoder(model, 4, batch_size=4, backend=counter)
        for count in (4, 3, 1):
            expected = model.encode_image(model.preprocessor.normalize(pixels[:count]))
            torch.testing.assert_close(encode(pixels[:count]), expected, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


def test_few_images_transformers_and_towers_that_fail_are_not_compiled(
    compiling, caplog, monkeypatch
):
    def broken(graph, inputs):
        raise ValueError("no compiler")

    with torch.no_grad():
        assert compiled_encoder(model_of("declip_conv_tiny", 32), 2, 4) is None
        assert compiled_encoder(model_of("declip_vit_tiny", 32), 3, 4) is None
        assert caplog.text == ""
        assert compiled_encoder(model_of("declip_conv_tiny", 32), 3, 4, broken) is None
    assert "no compiler" in caplog.text
    monkeypatch.setattr(device, "COMPILED_ON", ("cuda",))
    assert compiled_encoder(model_of("declip_conv_tiny", 32), 3, 4) is None
