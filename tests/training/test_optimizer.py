"""AdamW's groups and step, Muon against a plain loop, and the schedule of the learning rate."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from conftest import TINY, WEIGHTS
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe, Train
from declip.supervision.objective import Objective
from declip.training.optimizer import (
    build_optimizer,
    decays,
    learning_rate,
    named_trainable,
    use_muon,
)
from golden_cases import GOLDEN

UNDECAYED_WORDS = ("bias", "norm", "ln_", "logit_scale", "pos_embed", "positional", "cls_token")


def test_groups_hold_every_parameter_once_and_decay_spares_biases_norms_scales_and_positions():
    recipe = Recipe.model_validate({**TINY, "loss_weights": WEIGHTS["defilip"]})
    model = DualEncoder(recipe)
    named = named_trainable(model, objective := Objective(recipe, model))
    spared = {name for name, parameter in named if not decays(name, parameter)}
    assert spared == {name for name, _ in named if any(word in name for word in UNDECAYED_WORDS)}
    assert "model.text_tower.token_embedding.weight" not in spared
    optimizer = build_optimizer(named, recipe.train)
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(held) == sorted(
        id(p) for module in (model, objective) for p in module.parameters()
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("fastvit_t8", {"layer_scale.gamma", "conv_scale.conv.weight"}),
        ("deit_tiny_distilled_patch16_224", {"cls_token", "dist_token", "pos_embed"}),
        ("swinv2_cr_tiny_ns_224", set()),
        ("swin_tiny_patch4_window7_224", {"relative_position_bias_table"}),
    ],
)
def test_scales_positions_and_tokens_of_other_towers_do_not_decay(name, spared):
    with torch.device("meta"):
        tower = timm.create_model(name)
    found = {key for key, p in tower.named_parameters() if p.ndim > 1 and not decays(key, p)}
    assert {key for key in found if key.endswith(tuple(spared))} == found
    assert {word for word in spared if any(key.endswith(word) for key in found)} == spared
    assert not decays(
        "model.text_tower.trunk.embeddings.position_embedding.weight", torch.ones(2, 3)
    )


@pytest.mark.golden
def test_the_schedule_equals_the_official_one():
    """Their iterations count from 1 and their configuration runs 128,001 of them."""
    cases = np.load(GOLDEN / "loss_cases.npz")
    train = Train(steps=128001, warmup_lr=1e-4, lr=1e-3, warmup_steps=2500)
    ours = [learning_rate(int(iteration) - 1, train) for iteration in cases["lr_schedule/iter"]]
    np.testing.assert_allclose(ours, cases["lr_schedule/lr"], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("warmup", [0, 1, 2, 10, 50, 100])
def test_the_learning_rate_rises_to_its_peak_and_falls_to_zero(warmup):
    train = Train(steps=50, warmup_lr=1e-4, lr=1e-3, warmup_steps=warmup)
    rates = [learning_rate(step, train) for step in range(50)]
    top = max(min(warmup, 50) - 1, 0)
    assert np.all(np.diff(rates[: top + 1]) > 0)
    assert np.all(np.diff(rates[top:]) < 0)
    assert max(rates) <= 1e-3
    assert warmup < 2 or (rates[0], rates[top]) == pytest.approx((1e-4, 1e-3))
    assert warmup >= 50 or rates[-1] == pytest.approx(0, abs=1e-12)


LR, DECAY = 0.02, 0.1


def layers():
    torch.manual_seed(0)
    made = {
        "wide": nn.Linear(5, 3),
        "same": nn.Linear(5, 3),
        "tall": nn.Linear(3, 7),
        "conv": nn.Conv2d(2, 4, 3),
    }
    return nn.ModuleDict(
        {**made, "token_embedding": nn.Embedding(9, 4), "norm": nn.LayerNorm(4)}
    ).double()


def take(optimizer, module, count):
    """Take steps with random gradients, and give them by name."""
    gradients = {name: [] for name, _ in module.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = LR
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        for name, parameter in module.named_parameters():
            parameter.grad = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype
            )
            gradients[name].append(parameter.grad.clone())
        optimizer.step()
    return gradients


def plain_muon(weight, gradients):
    """Muon's steps on one weight, as its authors write them."""
    weight, momentum = weight.clone(), torch.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + gradient
        x = (gradient + 0.95 * momentum).flatten(1)
        rows, columns = x.shape
        x = x.T if rows > columns else x
        x = x / x.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x.T if rows > columns else x
        weight = weight * (1 - LR * DECAY) - LR * 0.2 * max(rows, columns) ** 0.5 * x.reshape(
            weight.shape
        )
    return weight


def test_equals_a_plain_loop_and_adamw_on_the_rest():
    ours, rest = layers(), layers()
    start = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    gradients = take(build_optimizer(ours.named_parameters(), Train(optimizer="muon")), ours, 4)
    take(build_optimizer(rest.named_parameters(), Train()), rest, 4)
    matrices = [name for name, parameter in ours.named_parameters() if use_muon(name, parameter)]
    assert len(matrices) == 4
    expected = dict(rest.named_parameters()) | {
        name: plain_muon(start[name], gradients[name]) for name in matrices
    }
    torch.testing.assert_close(dict(ours.named_parameters()), expected, rtol=1e-10, atol=1e-12)


def test_large_weights_in_bfloat16_are_orthogonalized_too():
    torch.manual_seed(0)
    layer = nn.Linear(300, 128, bias=False)
    before = layer.weight.detach().clone()
    take(
        build_optimizer(layer.named_parameters(), Train(optimizer="muon", weight_decay=0)), layer, 1
    )
    singular = torch.linalg.svdvals((layer.weight - before).detach() / (LR * 0.2 * 300**0.5))
    assert 0.65 < singular.min() <= singular.max() < 1.25
