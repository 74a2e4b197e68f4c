"""Towers of full size, built without memory."""

from typing import Any

import pytest
import torch

from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.supervision.objective import Objective

OPENAI = {
    "vit_base_patch32_clip_quickgelu_224": 151_277_313,
    "vit_base_patch16_clip_quickgelu_224": 149_620_737,
    "resnet50_clip": 102_007_137,
}
"""Parameters of OpenAI's CLIP; ours has a word more, the mask, and a bias of the text projection."""


def meta(image: str, **keys: Any) -> DualEncoder:
    recipe = load_recipe("clip-yfcc15m-vitb32", {"image.model": image, "image.freeze_patch_embed": False, **keys})
    with torch.device("meta"):
        model = DualEncoder.from_recipe(recipe)
        Objective(recipe, model)
    return model


@pytest.mark.parametrize("image", OPENAI)
def test_towers_have_the_size_of_openai(image):
    width = 1024 if image == "resnet50_clip" else 512
    assert sum(p.numel() for p in meta(image, embed_dim=width).parameters()) == OPENAI[image] + 512 + width


def test_the_largest_tower_of_the_paper_has_the_size_that_timm_states():
    trunk = meta("regnety_640").image_tower.trunk
    assert sum(p.numel() for p in trunk.parameters()) + 1000 * (4920 + 1) == 281_378_786  # with 1,000 classes
