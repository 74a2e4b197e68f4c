"""The operations of a training step, counted without computing it."""

import pytest

from conftest import TINY, tiny_tree
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe


@pytest.fixture
def count_cost(scripts):
    return scripts("operations").count_cost


def of_a_transformer(tokens, width, layers):
    """Multiplications and additions of a forward pass: four matrices of attention, the MLP, both products of it."""
    return layers * 2 * tokens * (4 * width**2 + 8 * width**2 + 2 * tokens * width)


def test_operations_are_those_of_the_formula(count_cost):
    recipe, length = Recipe.model_validate(tiny_tree("unused", "declip")), 16
    image = of_a_transformer(17, 64, 1) + 2 * 16 * (3 * 8 * 8) * 64 + 2 * 64 * 16
    text = of_a_transformer(length, 32, 1) + 2 * 32 * 16
    patches = 2 * 16 * (3 * 8 * 8) * 64  # the pixels need no gradient
    assert count_cost(recipe, length).flops == 2 * (3 * (image + text) - patches)


def test_the_comparison_of_tokens_is_counted(count_cost):
    tree, length = tiny_tree("unused", "declip"), 16
    section = {"late_interaction": {"width": 8, "top_k": 4}}
    without = Recipe.model_validate({**tree, **section})
    losses = {**without.loss_weights, "late_interaction": 0.2}
    compared = Recipe.model_validate({**tree, **section, "loss_weights": losses})
    products = 16 * 4 + length * 4  # 16 patches, of each direction four keys of a pair
    found = count_cost(compared, length).flops - count_cost(without, length).flops
    assert found == 4 * 2 * 8 * products * compared.train.batch_size


def test_a_second_forward_pass_costs_a_third_more(count_cost):
    once, *twice = (
        count_cost(
            Recipe.model_validate(tiny_tree("unused", train={**TINY["train"], **keys})), 16
        ).flops
        for keys in ({}, {"grad_checkpointing": True}, {"grad_cache_chunk": 4})
    )
    assert [flops / once for flops in twice] == pytest.approx([4 / 3] * 2, rel=0.05)


def test_memory_grows_by_the_float32_activations_that_a_pair_saves(count_cost):
    precise, short = (
        count_cost(Recipe.model_validate(tiny_tree("unused", train={"precision": precision})), 16)
        for precision in ("fp32", "bf16")
    )
    assert 0.4 < short.activations / precise.activations < 1
    model = DualEncoder(Recipe.model_validate(tiny_tree("unused")))
    assert (
        precise.states
        == short.states
        == 16 * sum(parameter.numel() for parameter in model.parameters())
    )
