"""Distillation: what the averaged and the fixed teacher see, and how the average follows the learner."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conftest import TINY
from data.fakes import Noise
from declip.data.batch import PairBatch
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.supervision.distillation import relational_distillation
from declip.supervision.objective import without_run_state
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


def test_the_averaged_teacher_follows_the_learner_and_learns_nothing_itself() -> None:
    model, objective = parts(WEIGHTS, image={"model": "declip_conv_tiny", "size": 32})
    batch = replace(random_batch(views=3), masked=None, labels=None)
    with pytest.raises(UserError, match=r"objective\.prepare"):
        objective(model, batch)
    objective.prepare(Noise(4), model)
    objective.train()
    term: Any = objective.terms["distillation"]
    assert not any(parameter.requires_grad for parameter in objective.parameters())
    assert not without_run_state(objective.state_dict()), "a teacher is no head"
    model.eval()
    for step in range(2):
        before = {name: value.clone() for name, value in term.teacher.state_dict().items()}
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1)
        image, text = term.teacher.encode_image(batch.views["contrastive"].pixels), batch.texts[0]
        expected = followed(model, batch, image, term.teacher.encode_text(text), term.teacher.logit_scale.exp())
        torch.testing.assert_close(objective(model, batch)["distillation"], expected)
        assert all(torch.equal(value, before[name]) for name, value in term.teacher.state_dict().items())
        objective.after_step(model)
        weight = 1 if step == 0 else 1 - 2 / 11  # the decay grows as (1 + n) / (10 + n), up to 0.99
        for name, value in model.state_dict().items():
            averaged = torch.lerp(before[name], value, weight) if value.is_floating_point() else value
            torch.testing.assert_close(term.teacher.state_dict()[name], averaged, msg=name)
    assert objective.state_dict()["terms.distillation._extra_state"] == 2


def test_what_a_teacher_cannot_do_is_refused() -> None:
    whole, captions = {"train": {"strategy": "fsdp"}}, {"finetune": {"pretrained": "runs/b", "cached_views": 2}}
    for teacher, key, keys in (("ema", "train.strategy", whole), ("runs/a", "finetune.cached_views", captions)):
        tree = {"loss_weights": {"contrastive": 1.0, "distillation": 1.0}, "distillation": {"teacher": teacher}, **keys}
        with pytest.raises(ValueError, match=f"distillation.teacher={teacher} cannot be combined with {key}"):
            Recipe.model_validate(tree)
