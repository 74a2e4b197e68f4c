"""Image towers without gradients: the features are those of the model."""

import pytest
import torch

from conftest import TINY, WEIGHTS
from declip.models.dual_encoder import DualEncoder
from declip.models.inference import image_encoder
from declip.recipe.schema import Recipe


def model_of(tower: str, size: int) -> DualEncoder:
    torch.manual_seed(0)
    tree = {**TINY, "data": {"source": "unused"}, "loss_weights": WEIGHTS["clip"]}
    model = DualEncoder.from_recipe(Recipe.model_validate(tree | {"image": {"model": tower, "size": size}}))
    with torch.no_grad():
        for name, buffer in model.named_buffers():  # statistics that change something
            if "running" in name:
                buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize(("tower", "size"), [("tf_efficientnet_lite0", 64), ("declip_vit_tiny", 32)])
def test_features_are_those_of_the_model(tower: str, size: int) -> None:
    model = model_of(tower, size)
    images = torch.randn(9, 3, size, size)
    with torch.no_grad():
        expected = model.encode_image(images)
        torch.testing.assert_close(image_encoder(model)(images), expected, rtol=0, atol=1e-5)
