"""Image towers of many kinds, each cut down: timm's own features, tokens, and a training step of every term."""

import pytest
import timm
import torch

from conftest import TINY
from conftest import WEIGHTS as METHODS
from declip.data.batch import PairBatch
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training.assemble import plan_of
from declip.training.parallel import build_learner
from declip.training.step import StepParts, training_step

VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}
TOWERS = {
    "vit_large_patch14_clip_224": (28, VIT, 4, False),
    "vit_base_patch16_siglip_224": (32, VIT, 4, False),
    "vit_base_mci_224": (32, {"depth": 1}, 4, True),
    "convnext_tiny": (64, {"depths": [1, 1, 2, 1], "dims": [16, 32, 64, 128]}, 4, False),
    "swin_tiny_patch4_window7_224": (
        64, {"depths": [1, 1, 2, 1], "embed_dim": 24, "num_heads": [1, 2, 4, 8]}, 4, False,
    ),
    "regnety_002": (64, {}, 4, True),
    "fastvit_mci0": (64, {"layers": [1, 1, 2, 1], "embed_dims": [16, 32, 64, 128]}, 4, True),
    "test_efficientnet": (64, {}, 4, True),
}  # fmt: skip
"""Name → image size, options, tokens, whether it has batch norm."""


@pytest.mark.parametrize("name", TOWERS)
def test_a_tower_is_timms_and_learns_from_every_term(name):
    """No parameter is left without a gradient, which DDP would wait for, and a step changes the trunk."""
    size, options, cells, batch_norm = TOWERS[name]
    terms = {**METHODS["defilip"], "simclr": 0.1}
    recipe = Recipe.model_validate(
        {**TINY, "image": {"model": name, "size": size, "model_kwargs": options}, "loss_weights": terms}
    )
    torch.manual_seed(0)
    model = DualEncoder.from_recipe(recipe)
    tower, images = model.image_tower, torch.randn(2, 4, 3, size, size)
    assert tower.has_batch_norm == batch_norm
    fixed = {"img_size": size} if name.startswith(("vit", "swin")) else {}
    _check_features(tower.eval(), timm.create_model(name, num_classes=0, **options, **fixed), images[0], cells)

    objective = Objective(recipe, model)
    tokens = model.tokenizer([f"{number} red circles" for number in range(4)])
    masked, labels = tokens.clone(), torch.full_like(tokens, -100)
    masked[:, 2], labels[:, 2] = model.tokenizer.mask, tokens[:, 2]
    batch = PairBatch(
        views={"first": images[0], "second": images[1]},
        texts=torch.stack([tokens, tokens]),
        masked=masked,
        labels=labels,
    )
    learner = build_learner(recipe, model.train(), objective.train())
    before = {name: weight.clone() for name, weight in tower.trunk.named_parameters()}
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    found = training_step(StepParts(learner, optimizer, plan_of(recipe), recipe.train), batch)
    assert set(found) == {*terms, "loss", "grad_norm"}
    assert all(torch.isfinite(value) for value in found.values())
    assert [name for name, weight in learner.named_parameters() if weight.grad is None] == []
    assert any(not torch.equal(weight, before[name]) for name, weight in tower.trunk.named_parameters())


def _check_features(tower, theirs, images, cells):
    norm = {f"norm.{part}": weight for part, weight in tower.norm.state_dict().items()}
    theirs.load_state_dict({**tower.trunk.state_dict(), **norm})
    with torch.no_grad():
        features = tower(images)
        torch.testing.assert_close(features.pre_logits, theirs.eval()(images), rtol=1e-5, atol=1e-5)
    assert features.pooled.shape == (4, 16)
    assert features.tokens.shape == (4, cells, tower.token_width)
