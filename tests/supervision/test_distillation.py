"""Distillation: the distance against a plain loop, the averaged teacher's update, and the stored teacher's features."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from declip.errors import UserError
from declip.recipe.schema import Recipe
from declip.supervision.distillation import feature_distillation, relational_distillation
from declip.supervision.objective import without_run_state
from declip.supervision.soft_targets import caption_hashes
from supervision.test_objective import parts, random_batch
from supervision.test_word_classification import SOURCE


def test_distance_and_gradients_are_those_of_a_plain_loop(units: Any) -> None:
    inputs = [x.requires_grad_() for x in (units(2, 3, 4), units(1, 3, 4), units(3, 4), units(3, 4))]
    images, texts, *teachers = inputs
    expected = sum(
        (row - other.detach()).square().sum() / (len(views) * 3)
        for views, teacher in zip((images, texts), teachers, strict=True)
        for view in views
        for row, other in zip(view, teacher, strict=True)
    )
    found = feature_distillation(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, inputs, allow_unused=True) for loss in (found, expected)]
    torch.testing.assert_close(*gradients)
    assert [x is None for x in gradients[0]] == [False, False, True, True]


def test_a_teacher_of_other_width_gets_no_gradient(units: Any) -> None:
    rows, keys, *teacher = (x.requires_grad_() for x in (units(2, 4), units(3, 4), units(2, 5), units(3, 5)))
    relational_distillation((rows, keys, 3.0), (*teacher, 9.0)).backward()
    assert [x.grad is None for x in (rows, keys, *teacher)] == [False, False, True, True]


def test_a_stored_teacher_is_looked_up_by_pair_and_caption(no_device_reads: Any) -> None:
    model, objective = parts({"contrastive": 1.0, "distillation": 1.0}, distillation={"teacher": "another model"})
    batch = replace(random_batch(), masked=None, labels=None, sample_ids=torch.arange(8).flip(0) + 16)  # third epoch
    with pytest.raises(UserError, match="set_teacher"):
        objective(model, batch)
    term: Any = objective.terms["distillation"]
    image, text = torch.randn(2, 8, 6)
    hashes, order = caption_hashes(batch.texts[:1])[0].sort()
    term.stored = image.flip(0), text[order], hashes, torch.tensor(2.0)
    batch.texts[0, 2, 1] += 1  # as if the file had changed
    text[2] = 0
    with no_device_reads():
        loss = objective(model, batch)["distillation"]
    caption, scale = model.encode_text(batch.texts[0]), model.logit_scale.exp()
    expected = []
    for view in batch.views.values():
        encoded = model.encode_image(view.pixels)
        expected.append(relational_distillation((encoded, caption, scale), (image, text, 2.0)))
        expected.append(relational_distillation((caption, encoded, scale), (text, image, 2.0)))
    torch.testing.assert_close(loss, torch.stack(expected).mean())


def test_the_teacher_follows_the_learner_and_learns_nothing_itself() -> None:
    weights, image = {"contrastive": 1.0, "distillation": 1.0}, {"model": "declip_conv_tiny", "size": 32}
    model, objective = parts(weights, image=image, distillation={"decay": 0.75})
    batch = replace(random_batch(views=3), masked=None, labels=None)
    with pytest.raises(UserError, match=r"objective\.prepare"):
        objective(model, batch)
    objective.prepare(SOURCE, model)
    objective.train()
    teacher: Any = objective.terms["distillation"]
    assert not any(parameter.requires_grad for parameter in objective.parameters())
    assert not without_run_state(objective.state_dict()), "a teacher is no head"
    model.eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    loss = objective(model, batch)["distillation"]
    images = torch.stack([model.encode_image(view.pixels) for view in batch.views.values()])
    texts = torch.stack([model.encode_text(view) for view in batch.texts])
    features = teacher.image_tower(batch.views["contrastive"].pixels), teacher.text_tower(batch.texts[0])
    expected = [torch.nn.functional.normalize(found.pooled, dim=-1) for found in features]
    torch.testing.assert_close(loss, feature_distillation(images, texts, *expected))
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    objective.after_step(model)
    for name, value in teacher.state_dict().items():
        learner = model.state_dict()[name]
        averaged = 0.75 * before[name] + 0.25 * learner if value.is_floating_point() else learner
        torch.testing.assert_close(value, averaged, msg=name)


def test_what_a_teacher_cannot_do_is_refused() -> None:
    whole, captions = {"train": {"strategy": "fsdp"}}, {"finetune": {"pretrained": "runs/b", "cached_views": 2}}
    for teacher, key, keys in (("ema", "train.strategy", whole), ("runs/a", "finetune.cached_views", captions)):
        tree = {"loss_weights": {"contrastive": 1.0, "distillation": 1.0}, "distillation": {"teacher": teacher}, **keys}
        with pytest.raises(ValueError, match=f"distillation.teacher={teacher} does not work with {key}"):
            Recipe.model_validate(tree)
