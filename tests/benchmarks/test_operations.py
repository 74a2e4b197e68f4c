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


LENGTH = 16
IMAGE = of_a_transformer(17, 64, 1) + 2 * 16 * (3 * 8 * 8) * 64 + 2 * 64 * 16
TEXT = of_a_transformer(LENGTH, 32, 1) + 2 * 32 * 16
PATCHES = 2 * 16 * (3 * 8 * 8) * 64  # the pixels need no gradient


@pytest.mark.parametrize("top_k", [None, 4])
def test_operations_are_those_of_the_formula(count_cost, top_k):
    """Of two views of images and captions, and of FILIP's comparison of tokens."""
    tree, compared = tiny_tree("unused", "declip"), 0
    if top_k:
        tree["late_interaction"] = {"width": 8, "top_k": top_k}
        tree["loss_weights"] = {**tree["loss_weights"], "late_interaction": 0.2}
        products = 16 * top_k + LENGTH * top_k  # 16 patches, of each direction four keys of a pair
        compared = 4 * 2 * 8 * products * tree["train"]["batch_size"]
    found = count_cost(Recipe.model_validate(tree), LENGTH)
    assert found.flops == 2 * (3 * (IMAGE + TEXT) - PATCHES) + compared


def with_train(**keys):
    return Recipe.model_validate(tiny_tree("unused", train={**TINY["train"], **keys}))


@pytest.mark.parametrize("keys", [{"grad_checkpointing": True}, {"grad_cache_chunk": 4}])
def test_a_second_forward_pass_costs_a_third_more(count_cost, keys):
    once = 3 * (IMAGE + TEXT) - PATCHES
    assert count_cost(with_train(**keys), LENGTH).flops / once == pytest.approx(4 / 3, rel=0.05)


def test_memory_grows_by_the_float32_activations_that_a_pair_saves(count_cost):
    precise, short = (
        count_cost(with_train(precision=precision), LENGTH) for precision in ("fp32", "bf16")
    )
    assert 0.4 < short.activations / precise.activations < 1
    model = DualEncoder(with_train())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert precise.states == short.states == 16 * parameters
