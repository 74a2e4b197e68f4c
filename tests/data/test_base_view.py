"""SLIP's third view: the contrast sees a milder one, the two strong ones stay."""

from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF

from conftest import TINY, WEIGHTS
from declip.data.batch import Photometric
from declip.data.sources.open import open_source
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.training.setup import build_loader, image_views


def batch_of(table: Path, base: dict[str, object] | None) -> torch.Tensor:
    tree = {**TINY, "loss_weights": WEIGHTS["slip"], "data": {"source": str(table)}, "views": {"contrastive_view": base}}
    recipe = Recipe.model_validate(tree)
    source, model = open_source(str(table)), DualEncoder.from_recipe(recipe)
    with build_loader(recipe, source, model, image_views(recipe)) as loader:
        batch = next(loader)
    assert batch.photometric is not None
    assert batch.photometric.jitter.shape == batch.images.shape[:2]
    return batch.images


def test_each_view_is_blurred_with_its_own_kernel() -> None:
    """The kernel of the blur reaches three of the view's own largest sigma, as torchvision's does if given so."""
    recipe = Recipe.model_validate({**TINY, "loss_weights": WEIGHTS["slip"], "views": {"contrastive_view": {"blur_sigma": [0.5, 1.0]}}})
    strong, base = image_views(recipe), image_views(recipe, recipe.views.contrastive_view)
    generator = np.random.default_rng(0)
    draws = [view.draw(generator)._replace(jitter=False, gray=False, sigma=1.0) for view in (base, strong)]
    edge = torch.zeros(2, 1, 3, recipe.image.size, recipe.image.size, dtype=torch.uint8)
    edge[..., recipe.image.size // 2 :] = 255
    found = strong.finish(edge, Photometric.stack([[draw] for draw in draws]))
    for view, radius in ((0, 3), (1, 6)):
        blurred = TF.gaussian_blur(edge[view, 0].float() / 255, 2 * radius + 1, 1.0)
        expected = TF.normalize(blurred, strong.mean.tolist(), strong.std.tolist())
        assert (found[view, 0] - expected).abs().max() < 1e-5


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
