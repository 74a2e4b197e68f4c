"""Muon against a plain loop, and what every optimizer keeps in a checkpoint."""

import torch
from torch import nn

from declip.recipe.schema import Train
from declip.training.optimizer import build_optimizer, use_muon

LR, DECAY = 0.02, 0.1


def layers():
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "wide": nn.Linear(5, 3),
            "same": nn.Linear(5, 3),
            "tall": nn.Linear(3, 7),
            "conv": nn.Conv2d(2, 4, 3),
            "token_embedding": nn.Embedding(9, 4),
            "norm": nn.LayerNorm(4),
        }
    ).double()


def take(optimizer, module, steps):
    for group in optimizer.param_groups:
        group["lr"] = LR
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        optimizer.step()


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
        weight = weight * (1 - LR * DECAY) - LR * 0.2 * max(rows, columns) ** 0.5 * x.reshape(weight.shape)
    return weight


def test_equals_a_plain_loop_and_adamw_on_the_rest():
    ours, rest = layers(), layers()
    start = {name: parameter.detach().clone() for name, parameter in ours.named_parameters()}
    take(build_optimizer(ours.named_parameters(), Train(optimizer="muon")), ours, range(4))
    take(build_optimizer(rest.named_parameters(), Train()), rest, range(4))
    expected = dict(rest.named_parameters())
    gradients = {name: [] for name in start}
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for name, value in start.items():
            gradients[name].append(torch.randn(value.shape, generator=generator, dtype=value.dtype))
    orthogonalized = 0
    for name, parameter in ours.named_parameters():
        muon = use_muon(name, parameter)
        orthogonalized += muon
        wanted = plain_muon(start[name], gradients[name]) if muon else expected[name]
        torch.testing.assert_close(parameter, wanted, rtol=1e-10, atol=1e-12)
    assert orthogonalized == 4


def test_large_weights_in_bfloat16_are_orthogonalized_too():
    torch.manual_seed(0)
    layer = nn.Linear(300, 128, bias=False)
    before = layer.weight.detach().clone()
    take(build_optimizer(layer.named_parameters(), Train(optimizer="muon", weight_decay=0)), layer, range(1))
    singular = torch.linalg.svdvals((layer.weight - before).detach() / (LR * 0.2 * 300**0.5))
    assert 0.65 < singular.min() <= singular.max() < 1.25
