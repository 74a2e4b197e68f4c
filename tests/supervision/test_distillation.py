"""Distillation: what the teacher sees."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import TINY
from declip.data.batch import PairBatch
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.distillation import relational_distillation
from supervision.test_objective import parts, random_batch

WEIGHTS = {"contrastive": 1.0, "distillation": 1.0}


def test_a_teacher_of_other_width_gets_no_gradient(units: Any) -> None:
    rows, keys, *teacher = (x.requires_grad_() for x in (units(2, 4), units(3, 4), units(2, 5), units(3, 5)))
    relational_distillation((rows, keys, 3.0), (*teacher, 9.0)).backward()
    assert [x.grad is None for x in (rows, keys, *teacher)] == [False, False, True, True]


def followed(model: DualEncoder, batch: PairBatch, image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The loss by its parts: every view with the caption, in both directions."""
    caption, own = model.encode_text(batch.texts[0]), model.logit_scale.exp()
    losses = []
    for view in batch.views.values():
        encoded = model.encode_image(view.pixels)
        losses.append(relational_distillation((encoded, caption, own), (image, text, scale)))
        losses.append(relational_distillation((caption, encoded, own), (text, image, scale)))
    return torch.stack(losses).mean()


def test_a_fixed_teacher_sees_the_first_view_in_its_own_size_and_statistics(no_device_reads: Any) -> None:
    model, objective = parts(WEIGHTS, distillation={"teacher": "another model"})
    batch = replace(random_batch(), masked=None, labels=None)
    with pytest.raises(UserError, match="set_teacher"):
        objective(model, batch)
    image = {**TINY["image"], "size": 16, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    teacher = DualEncoder.from_recipe(Recipe.model_validate({**TINY, "image": image, "embed_dim": 6}))
    term: Any = objective.terms["distillation"]
    term.set_teacher(teacher)
    with no_device_reads():
        loss = objective(model, batch)["distillation"]
    pixels, ours, theirs = batch.views["first"].pixels, model.preprocessor, teacher.preprocessor
    colors = pixels * ours.std.view(3, 1, 1) + ours.mean.view(3, 1, 1)
    small = F.interpolate(colors, (16, 16), mode="bilinear", antialias=True)
    seen = teacher.encode_image((small - theirs.mean.view(3, 1, 1)) / theirs.std.view(3, 1, 1))
    expected = followed(model, batch, seen, teacher.encode_text(batch.texts[0]), teacher.logit_scale.exp())
    torch.testing.assert_close(loss, expected)
    assert not any(".teacher." in name for name in objective.state_dict())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_missing_teacher_is_refused() -> None:
    with pytest.raises(ValueError, match=r"requires distillation\.teacher"):
        Recipe.model_validate({"loss_weights": WEIGHTS})
