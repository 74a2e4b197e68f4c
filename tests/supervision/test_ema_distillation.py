"""The averaged teacher: the distance to it, and its update."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from declip.errors import UserError
from declip.interchange.weights import without_queue
from declip.supervision.ema_distillation import feature_distillation
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


def test_the_teacher_follows_the_learner_and_learns_nothing_itself() -> None:
    weights, image = {"contrastive": 1.0, "ema_distillation": 1.0}, {"model": "declip_conv_tiny", "size": 32}
    model, objective = parts(weights, image=image, ema_distillation={"decay": 0.75})
    batch = replace(random_batch(views=3), masked=None, labels=None)
    with pytest.raises(UserError, match=r"objective\.prepare"):
        objective(model, batch)
    objective.prepare(SOURCE, model)
    objective.train()
    teacher: Any = objective.terms["ema_distillation"]
    assert not any(parameter.requires_grad for parameter in objective.parameters())
    assert not without_queue(objective.state_dict()), "a teacher is no head"
    model.eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    loss = objective(model, batch)["ema_distillation"]
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
