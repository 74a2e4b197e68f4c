"""AdamW's groups and step, and the schedule of the learning rate."""

import numpy as np
import pytest
import torch

from conftest import TINY, WEIGHTS
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schedule import learning_rate
from declip.recipe.schema import Recipe, Train
from declip.supervision.objective import Objective
from declip.training.optimizer import build_optimizer, decays, named_trainable
from golden_cases import require_file

UNDECAYED_WORDS = ("bias", "norm", "ln_", "logit_scale", "pos_embed", "positional", "cls_token")


def parts(name: str = "defilip") -> tuple[DualEncoder, Objective, Recipe]:
    recipe = Recipe.model_validate({**TINY, "loss_weights": WEIGHTS[name]})
    model = DualEncoder.from_recipe(recipe)
    return model, Objective(recipe, model), recipe


def test_decay_spares_biases_norms_scales_and_positions_and_nothing_else() -> None:
    model, objective, _ = parts()
    named = named_trainable(model, objective)
    spared = {name for name, parameter in named if not decays(name, parameter)}
    expected = {name for name, _ in named if any(word in name for word in UNDECAYED_WORDS)}
    assert spared == expected
    assert "model.text_tower.token_embedding.weight" not in spared


def test_every_parameter_is_in_exactly_one_group() -> None:
    model, objective, recipe = parts()
    optimizer = build_optimizer(named_trainable(model, objective), recipe.train)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    learning = [id(p) for module in (model, objective) for p in module.parameters()]
    assert sorted(held) == sorted(learning)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def test_one_step_equals_adamw_by_hand() -> None:
    _, _, recipe = parts("clip")
    weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer([("w", weight)], recipe.train)
    optimizer.param_groups[0]["lr"] = 0.01
    weight.grad = torch.tensor([[0.5, -0.1]])
    optimizer.step()
    decayed = torch.tensor([[1.0, -2.0]]) * (1 - 0.01 * 0.1)
    torch.testing.assert_close(weight.data, decayed - 0.01 * torch.tensor([[1.0, -1.0]]), rtol=1e-5, atol=1e-6)


@pytest.mark.golden
def test_the_schedule_equals_the_official_one() -> None:
    """Their iterations count from 1 and their configuration runs 128,001 of them."""
    cases = np.load(require_file("loss_cases.npz"))
    train = Train(steps=128001, warmup_lr=1e-4, lr=1e-3, warmup_steps=2500)
    ours = [learning_rate(int(iteration) - 1, train) for iteration in cases["lr_schedule/iter"]]
    np.testing.assert_allclose(ours, cases["lr_schedule/lr"], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 2, 10, 50, 100])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_its_minimum(warmup: int) -> None:
    train = Train(steps=50, warmup_lr=1e-4, lr=1e-3, min_lr=1e-5, warmup_steps=warmup)
    rates = [learning_rate(step, train) for step in range(50)]
    top = max(min(warmup, 50) - 1, 0)
    assert np.all(np.diff(rates[: top + 1]) > 0)
    assert np.all(np.diff(rates[top:]) < 0)
    assert max(rates) <= 1e-3
    assert warmup < 2 or (rates[0], rates[top]) == pytest.approx((1e-4, 1e-3))
    assert warmup >= 50 or rates[-1] == pytest.approx(1e-5)
