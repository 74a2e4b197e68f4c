"""SLIP's third view: the contrast sees a milder one, the two strong ones stay."""

from pathlib import Path

import torch

from conftest import TINY, WEIGHTS
from declip.data.sources.open import open_source
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.training.setup import build_loader, image_views


def batch_of(table: Path, base: dict[str, object] | None) -> torch.Tensor:
    tree = {**TINY, "weights": WEIGHTS["slip"], "data": {"source": str(table)}, "views": {"base": base}}
    recipe = Recipe.model_validate(tree)
    source, model = open_source(str(table)), DualEncoder.from_recipe(recipe)
    with build_loader(recipe, source, model, image_views(recipe)) as loader:
        batch = next(loader)
    assert batch.photometric is not None
    assert batch.photometric.jitter.shape == batch.images.shape[:2]
    return batch.images


def test_the_first_view_is_the_base_view(table: Path) -> None:
    mild = {
        "scale": [1.0, 1.0],
        "ratio": [1.0, 1.0],
        "color_jitter_prob": 0,
        "grayscale_prob": 0,
        "blur_prob": 0,
        "hflip_prob": 0,
    }
    images = batch_of(table, mild)
    assert images.shape[0] == 3
    corners = images[0, :, :, :2, :2]
    assert (corners == 255).all(), "a whole picture keeps its white corners"
    assert not torch.equal(images[1], images[2])


def test_without_one_there_are_two_views(table: Path) -> None:
    assert batch_of(table, None).shape[0] == 2
