"""The averaged teacher: the distance, its update, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import TINY
from declip.errors import UserError
from declip.supervision.ema_distillation import feature_distillation
from supervision.test_objective import parts, random_batch
from supervision.test_word_classification import SOURCE

WEIGHTS = {"contrastive": 1.0, "ema_distillation": 1.0}


def test_the_distance_is_that_of_a_plain_loop(units: Callable[..., Tensor], check_precision: Any) -> None:
    inputs = [x.requires_grad_() for x in (units(2, 3, 4), units(1, 3, 4), units(3, 4), units(3, 4))]
    images, texts, teacher_image, teacher_text = (x.tolist() for x in inputs)
    expected = 0.0
    for views, teacher in ((images, teacher_image), (texts, teacher_text)):
        distances = [
            sum((x - y) ** 2 for x, y in zip(row, other, strict=True))
            for view in views
            for row, other in zip(view, teacher, strict=True)
        ]
        expected += sum(distances) / len(distances)
    found = feature_distillation(*inputs)
    assert found.item() == pytest.approx(expected, rel=1e-12)
    found.backward()
    assert [x.grad is None for x in inputs] == [False, False, True, True]
    assert torch.autograd.gradcheck(lambda x, y: feature_distillation(x, y, *inputs[2:]), inputs[:2])
    check_precision(feature_distillation, *(x.detach() for x in inputs))


def test_the_teacher_follows_the_learner_and_learns_nothing_itself() -> None:
    image = {"model": "declip_conv_tiny", "size": 32}
    model, objective = parts(WEIGHTS, image=image, ema_distillation={"decay": 0.75})
    batch = replace(random_batch(), masked=None, labels=None)
    with pytest.raises(UserError, match=r"objective\.prepare"):
        objective(model, batch)
    objective.prepare(SOURCE, model)
    objective.train()
    teacher: Any = objective.terms["ema_distillation"]
    assert not any(parameter.requires_grad for parameter in objective.parameters())
    model.eval()
    before = [{k: v.clone() for k, v in m.image_tower.state_dict().items()} for m in (teacher, model)]
    statistics = {k: v.clone() for k, v in teacher.state_dict().items() if "running" in k}
    with torch.no_grad():
        for tensor in model.image_tower.state_dict().values():
            tensor.add_(1)
    loss = objective(model, batch)["ema_distillation"]
    features = [model.encode_image(view.pixels) for view in batch.views.values()]
    first = torch.nn.functional.normalize(teacher.image_tower(batch.views["first"].pixels).pooled, dim=-1)
    texts = torch.stack([model.encode_text(view) for view in batch.texts])
    torch.testing.assert_close(loss, feature_distillation(torch.stack(features), texts, first, texts[0]))
    assert all(torch.equal(value, teacher.state_dict()[name]) for name, value in statistics.items())
    objective.after_step(model)
    for name, value in teacher.image_tower.state_dict().items():
        old, learner = before[0][name], model.image_tower.state_dict()[name]
        expected = 0.75 * old + 0.25 * learner if value.is_floating_point() else learner
        torch.testing.assert_close(value, expected, msg=name)


@pytest.mark.parametrize(("key", "value"), [("grad_cache_chunk", 4), ("strategy", "fsdp")])
def test_what_gives_the_teacher_no_pixels_or_no_weights_is_refused(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"train.{key}={value}"):
        parts(WEIGHTS, train={**TINY["train"], key: value})
