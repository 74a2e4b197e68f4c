from pathlib import Path

import pytest
import torch

from declip.errors import UserError
from declip.models.image_tower import ImageTower
from declip.models.patch_dropout import FLOOR, EdgePatchDropout
from declip.recipe.schema import PatchDropout

OPTIONS = {"patch_size": 8, "embed_dim": 64, "depth": 1}


def square(size: int = 32) -> torch.Tensor:
    """An image that is gray but for a white square inside the second patch of 8 × 8."""
    image = torch.zeros(1, 3, size, size)
    image[:, :, 2:6, 10:14] = 1
    return image


def test_patches_are_weighed_by_their_mean_gradient() -> None:
    dropout, images = EdgePatchDropout(0.5, 1), torch.rand(2, 3, 16, 24)
    dropout.look(images, (8, 8))
    gray = torch.nn.functional.pad(images.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")[:, 0]
    for number, image in enumerate(gray):
        strength = torch.zeros(16, 24)
        for y in range(16):
            for x in range(24):
                part = image[y : y + 3, x : x + 3]
                weights = torch.tensor([1.0, 2.0, 1.0])
                across = weights @ (part[:, 0] - part[:, 2])
                down = weights @ (part[0] - part[2])
                strength[y, x] = (across**2 + down**2).sqrt()
        means = strength.reshape(2, 8, 3, 8).mean(dim=(1, 3)).flatten()
        torch.testing.assert_close(dropout.weights[number], means / means.mean() + FLOOR)


def test_patches_with_edges_stay_and_the_class_token_always() -> None:
    dropout = EdgePatchDropout(0.75, 1)
    tokens = torch.arange(17.0).view(1, 17, 1).expand(400, 17, 8)
    dropout.look(square().expand(400, -1, -1, -1), (8, 8))
    kept = dropout(tokens)
    assert kept.shape == (400, 1 + 4, 8)
    assert torch.equal(kept[:, 0, 0], torch.zeros(400))
    assert all(len(set(row)) == 5 for row in kept[:, :, 0].tolist()), "no patch twice"
    counts = torch.bincount(kept[:, 1:, 0].flatten().long(), minlength=17)[1:]
    assert counts[1] > 390, "nearly always kept: weight 16.1 of 17.6"
    assert (counts[torch.arange(16) != 1] / 400 - 3 / 15).abs().max() < 0.08, "the plain ones alike"
    assert dropout.eval()(tokens) is tokens


@pytest.mark.parametrize("by", ["chance", "edges"])
def test_a_tower_leaves_patches_out_in_training_only(by: str) -> None:
    torch.manual_seed(0)
    dropped = ImageTower("declip_vit_tiny", 32, 16, OPTIONS, patch_dropout=PatchDropout(rate=0.5, by=by))
    plain = ImageTower("declip_vit_tiny", 32, 16, OPTIONS).eval()
    plain.load_state_dict(dropped.state_dict())
    images = torch.rand(3, 3, 32, 32)
    assert dropped(images).tokens.shape[1] == 8
    assert torch.equal(dropped.eval()(images).pooled, plain(images).pooled)


def test_a_convolutional_tower_has_no_patches(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="vision transformer"):
        ImageTower("declip_conv_tiny", 32, 16, patch_dropout=PatchDropout())
