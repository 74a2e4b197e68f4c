"""Where a text fits in an image: embeddings of cells, and maps of scenes with pictures at known places."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from conftest import TINY, draw, refuses
from declip.models.dual_encoder import DualEncoder
from declip.models.image_tower import ImageTower
from declip.recipe.schema import Recipe

MEAN_POOLED = {
    "declip_conv_tiny": {},
    "swin_tiny_patch4_window7_224": {"depths": [1, 1], "embed_dim": 24, "num_heads": [1, 2]},  # channels last
    "vit_small_patch16_224": {"depth": 1, "global_pool": "avg", "fc_norm": False},
}


@pytest.mark.parametrize("name", MEAN_POOLED)
def test_the_embedding_of_an_image_is_the_mean_of_its_cells(name):
    tower, images = ImageTower(name, 64, 8, MEAN_POOLED[name]).eval(), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        cells, pooled = tower.encode_cells(images), tower(images).pooled
    assert cells.shape[1] > 1
    torch.testing.assert_close(cells.mean(1), pooled, rtol=1e-5, atol=1e-5)


def test_cells_behind_a_class_token_are_projected_as_it_is():
    tower, images = ImageTower("declip_vit_tiny", 32, 8).eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = tower.proj(tower.norm(tower(images).tokens))
        torch.testing.assert_close(tower.encode_cells(images), expected)


def test_cells_behind_an_attention_pool_take_the_path_of_its_value():
    tower = ImageTower("resnet50_clip", 64, 8, {"depths": [1, 1, 1, 1]}).eval()
    pool = tower.trunk.head
    torch.nn.init.zeros_(pool.pos_embed)  # else the mean of the positions is added
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        values = pool.qkv(tower(images).tokens)[..., -pool.embed_dim :] if pool.qkv else pool.v(tower(images).tokens)
        torch.testing.assert_close(tower.encode_cells(images), tower.proj(values), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tower", ["declip_conv_tiny", "declip_vit_tiny"])
def test_the_half_of_a_scene_that_a_text_names_has_the_larger_values(tower):
    torch.manual_seed(0)
    recipe = Recipe.model_validate({**TINY, "image": {"model": tower, "size": 64}})
    model = DualEncoder.from_recipe(recipe).eval()
    red, blue = (draw(color, "square", 60) for color in ("red", "blue"))
    scene = Image.new("RGB", (120, 60))
    scene.paste(red, (0, 0))
    scene.paste(blue, (60, 0))
    with torch.no_grad():
        a, b = (model.image_tower.encode_cells(model.preprocess(picture))[0].mean(0) for picture in (red, blue))
    for named, text in ((0, a - b), (1, b - a)):
        model.encode_text = lambda tokens, text=text: F.normalize(text, dim=0)[None]
        found = model.similarity_map(scene, "the first or the second")
        assert found.shape == (60, 120)
        halves = found[:, :60].mean(), found[:, 60:].mean()
        assert halves[named] > halves[1 - named]


def test_the_mean_of_a_map_is_the_cosine_of_image_and_text():
    model = DualEncoder.from_recipe(Recipe.model_validate({**TINY, "image": {"model": "declip_conv_tiny", "size": 64}}))
    picture = draw("red", "square").resize((8, 8))  # as many pixels as cells, so that none is interpolated
    with torch.no_grad():
        image, text = (model.eval().encode_image(model.preprocess(picture)), model.encode_text(model.tokenize("red")))
    torch.testing.assert_close(model.similarity_map(picture, "red").mean(), (image @ text.mT)[0, 0])


def test_a_size_that_the_tower_cannot_take_is_named():
    model = DualEncoder.from_recipe(Recipe.model_validate(TINY)).eval()
    refuses(r"64 × 64 pixels.*Give another size", model.similarity_map, draw("red", "square"), "red", size=64)
