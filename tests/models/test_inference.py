"""Image towers without gradients: the features are those of the model."""

import pytest
import torch

from conftest import tiny_tree
from declip.models.dual_encoder import DualEncoder
from declip.models.inference import image_encoder, inference_tower
from declip.recipe.schema import Recipe


def model_of(tower, size):
    torch.manual_seed(0)
    tree = tiny_tree("unused", image={"model": tower, "size": size})
    model = DualEncoder.from_recipe(Recipe.model_validate(tree))
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # statistics that change something
            if "running" in name:
                buffer.uniform_(0.5, 1.5) if name.endswith("var") else buffer.uniform_(-0.1, 0.1)
    return model.eval()


# The second is the built-in start's tower, the next two have norms before convolutions, the last has no batch norm.
@pytest.mark.parametrize(
    ("tower", "size"),
    [
        ("declip_conv_tiny", 32),
        ("tf_efficientnet_lite0", 64),
        ("resnetv2_18d", 64),
        ("densenet121", 64),
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
    model.image_tower.trunk.stem = torch.nn.Sequential(Swapped(), model.image_tower.trunk.stem).eval()
    assert inference_tower(model) is model.image_tower
