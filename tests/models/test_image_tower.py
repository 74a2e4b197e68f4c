import pytest
import timm
import torch
from torch import nn

from conftest import TINY, refuses
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import SMALL_TOWERS, ImageTower
from declip.models.layers import blocks_of
from declip.models.text_tower import TextTower
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective


@pytest.mark.parametrize("name", [*SMALL_TOWERS, "resnet50_clip", "convnext_atto", "vit_tiny_patch16_224"])
def test_pooled_hidden_and_token_features_have_the_announced_widths(name):
    tower = ImageTower(name, size=64, embed_dim=24).eval()
    with torch.no_grad():
        features = tower(torch.randn(2, 3, 64, 64))
    assert features.pooled.shape == (2, 24)
    assert features.pre_logits.shape == (2, tower.pre_logits_width)
    assert features.tokens.ndim == 3
    assert features.tokens.shape[2] == tower.token_width
    assert features.tokens.shape[1] > 1


def test_a_size_that_a_tower_cannot_take_is_named_and_trying_it_changes_nothing():
    tower = ImageTower("resnet50_clip", size=100, embed_dim=24, options={"depths": [1, 1, 1, 1]})
    before, random = {name: tensor.clone() for name, tensor in tower.state_dict().items()}, torch.get_rng_state()
    refuses(r"'resnet50_clip' does not take images of 100 × 100 pixels", tower.refuse_size, "resnet50_clip", 100)
    tower.refuse_size("resnet50_clip", 96)
    assert tower.training
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())


def test_tokens_of_a_map_keep_the_order_of_the_grid():
    tower = ImageTower("declip_conv_tiny", size=32, embed_dim=8).eval()
    images = torch.randn(1, 3, 32, 32)
    grid = tower.trunk.forward_features(images)
    tokens = tower(images).tokens
    torch.testing.assert_close(tokens[0, grid.shape[3]], grid[0, :, 1, 0])


def test_a_wrong_tower_is_named():
    for name, options, message in (
        ("resnet18", {"color": 3}, "timm cannot build the image tower 'resnet18'"),
        ("declip_vit_tiny", {"patch_size": "big"}, "timm cannot build"),
    ):
        refuses(message, ImageTower, name, 32, 8, options)
    tower = ImageTower("declip_vit_tiny", 32, 8, freeze_patch_embed=True)
    assert not tower.trunk.patch_embed.proj.weight.requires_grad
    refuses("needs a vision transformer", ImageTower, "declip_conv_tiny", 32, 8, freeze_patch_embed=True)


def test_an_image_much_smaller_than_the_tower_was_made_for_is_said_once(caplog):
    for _ in range(2):
        ImageTower("vit_tiny_patch16_224", 48, 8)
        ImageTower("declip_vit_tiny", 48, 8)
    said = [record.message for record in caplog.records if "48" in record.message]
    assert len(said) == 1
    assert "'vit_tiny_patch16_224'" in said[0]


def test_a_model_in_bfloat16_encodes_on_a_cpu():
    model = DualEncoder.from_recipe(Recipe.model_validate(TINY)).eval()
    images, tokens = torch.randn(2, 3, 32, 32), model.tokenize(["red circle", "blue"])
    exact = [model.encode_image(images), model.encode_text(tokens)]
    model.bfloat16()
    for found, expected in zip([model.encode_image(images), model.encode_text(tokens)], exact, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=0.03)


OPENAI = {
    "vit_base_patch32_clip_quickgelu_224": 151_277_313,
    "vit_base_patch16_clip_quickgelu_224": 149_620_737,
    "resnet50_clip": 102_007_137,
}
"""Parameters of OpenAI's CLIP; ours has a word more, the mask, and a bias of the text projection."""


def meta(image, **keys):
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


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("vit_base_patch32_clip_quickgelu_224", "Block", 12),
        ("resnet50_clip", "BottleneckBlock", 16),
        ("fastvit_mci0", "FastVitStage", 4),
        ("mobilenetv4_conv_small", "UniversalInvertedResidual", 12),
    ],
)
def test_blocks_of_towers(name, kind, count):
    with torch.device("meta"):
        tower = timm.create_model(name)
    blocks = blocks_of(tower)
    assert (type(blocks[0]).__name__, len(blocks)) == (kind, count)


def test_blocks_of_the_text_tower_and_of_a_plain_layer():
    tower = TextTower(vocabulary=10, end=9, embed_dim=4, width=8, layers=3, heads=2)
    assert blocks_of(tower) == list(tower.transformer.resblocks)
    assert blocks_of(nn.Linear(2, 2)) == []
