"""The table of rules: what a recipe becomes by each fact of a run, and what stays open without it."""

from dataclasses import dataclass, field

import pytest

from conftest import refuses
from declip.recipe.load import flat, load_recipe
from declip.recipe.resolve import RULES, Facts, resolve
from declip.recipe.schema import Recipe


@dataclass
class Weights:
    """A start: a CLIP with 24 dimensions."""

    tensors: dict = field(default_factory=lambda: {"logit_scale": 4.0})
    has_text: bool = True
    origin: str = "start"
    recipe: Recipe = field(
        default_factory=lambda: load_recipe(
            "clip", {"embed_dim": 24, "image.size": 64, "text.layers": 3, "image.mean": [0, 0, 0]}
        )
    )


CLIP = Weights()
SIGLIP = Weights({"logit_scale": 4.0, "logit_bias": -12.0})
IMAGES = Weights({}, has_text=False)
PAIRS = {"train.epochs": 2.5, "train.batch_size": 8}
SETS = {"zero_shot": ("a", "b"), "retrieval": ("b",)}
TABLE = [
    ("the precision of the device", {"train.precision": "auto"}, Facts(precision="bf16"),
     {"train.precision": "bf16"}),
    ("not auto", {"train.precision": "fp32"}, Facts(precision="bf16"), {}),
    ("epochs of whole batches", PAIRS, Facts(pairs=31), {"train.steps": 8, "train.epochs": None}),
    ("fewer pairs than a batch", PAIRS, Facts(pairs=3), {"train.steps": 2, "train.epochs": None}),
    ("steps", {"train.steps": 7}, Facts(pairs=31), {}),
    ("sets by their task", {"evaluation.val": ["a", "b"], "evaluation.zero_shot": ["c"]}, Facts(sets=SETS),
     {"evaluation.val": (), "evaluation.zero_shot": ("c", "a", "b"), "evaluation.retrieval": ("b",)}),
    ("weights of a CLIP", {}, Facts(CLIP),
     {"embed_dim": 24, "image.size": 64, "text.layers": 3, "image.mean": (0, 0, 0), "logit_scale.init": 4.0}),
    ("a user's preprocessing", {"image.size": 48, "text.context_length": 9}, Facts(CLIP),
     {"embed_dim": 24, "text.layers": 3, "image.mean": (0, 0, 0), "logit_scale.init": 4.0}),
    ("weights with a bias", {}, Facts(SIGLIP),
     {"embed_dim": 24, "image.size": 64, "text.layers": 3, "image.mean": (0, 0, 0), "logit_scale.init": 4.0,
      "logit_bias": -12.0, "loss_weights": {"sigmoid": 1.0}}),
    ("losses of the user", {"loss_weights": {"contrastive": 2.0}}, Facts(SIGLIP),
     {"embed_dim": 24, "image.size": 64, "text.layers": 3, "image.mean": (0, 0, 0), "logit_scale.init": 4.0,
      "logit_bias": -12.0}),
    ("an image tower alone", {}, Facts(IMAGES), {"image.size": 64, "image.mean": (0, 0, 0)}),
]  # fmt: skip


@pytest.mark.parametrize(("what", "keys", "facts", "becomes"), TABLE, ids=[row[0] for row in TABLE])
def test_a_fact_decides_its_keys_and_no_others(what, keys, facts, becomes):
    recipe = load_recipe("clip", {"evaluation.zero_shot": [], "evaluation.retrieval": [], **keys})
    before, after = (_values(each) for each in (recipe, resolve(recipe, facts)))
    assert {key: value for key, value in after.items() if value != before[key]} == becomes
    assert resolve(recipe, Facts()) == recipe


def _values(recipe):
    """Its values by dotted key, the losses in one."""
    return flat(recipe.model_dump(exclude={"loss_weights"})) | {"loss_weights": recipe.loss_weights}


def test_every_rule_is_of_a_fact_and_of_a_key():
    recipe = load_recipe("clip")
    assert {name for name, _ in RULES.values()} == set(Facts._fields)
    for key in RULES:
        assert recipe.with_keys({key: "x"}) != recipe


def test_keys_of_the_user_that_weights_decide_otherwise_are_refused():
    asked = load_recipe("clip", {"embed_dim": 8, "text.layers": 3, "train.precision": "auto"})
    refuses(r"'start'.*out: embed_dim=8 \(becomes 24\)\.$", resolve, asked, Facts(CLIP, "bf16"))
