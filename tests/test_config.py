from pathlib import Path
from typing import Any

import pytest
import yaml

from declip.errors import UserError
from declip.recipe.load import load_recipe, parse_overrides, recipe_names
from declip.recipe.schema import TERMS, Evaluation, Recipe, Weights
from declip.recipe.schema_pairs import Views

DEMO_SETS = {
    "zero_shot": ("builtin:emoji-validation",),
    "retrieval": ("builtin:emoji-validation",),
    "final_zero_shot": ("builtin:emoji-test", "builtin:emoji-test-new", "builtin:emoji-validation-new"),
    "final_retrieval": ("builtin:emoji-test",),
}


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
    text = (Path(__file__).parents[1] / "src/declip/recipes" / f"{name}.yaml").read_text()
    assert text.startswith("#"), "a recipe begins with what it is and what came out"


METHOD = {
    "clip": {"contrastive": 1},
    "slip": {"contrastive": 1, "simclr": 1},
    "filip": {"contrastive": 1, "late_interaction": 1},
    "declip": {"contrastive": 0.1, "multi_view": 0.3, "simsiam": 0.2, "masked_language": 0.2, "nearest_neighbor": 0.2},
    "declip-paper": {
        "contrastive": 0.4, "multi_view": 0.2, "simsiam": 0.2, "masked_language": 0.2, "nearest_neighbor": 0.2,
    },
    "defilip": {
        "contrastive": 0.1, "multi_view": 0.3, "simsiam": 0.2, "masked_language": 0.2, "nearest_neighbor": 0.2,
        "late_interaction": 0.2,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", METHOD)
def test_recipes_have_the_weights_of_the_method(name: str) -> None:
    weights = load_recipe(name).weights
    assert {term: getattr(weights, term) for term in weights.active()} == METHOD[name]


def test_the_published_recipe_has_the_authors_numbers() -> None:
    recipe = load_recipe("declip-yfcc15m-r50")
    assert recipe.image.model == "resnet50_clip"
    assert (recipe.image.size, recipe.embed_dim) == (224, 1024)
    assert (recipe.text.width, recipe.text.layers, recipe.text.heads, recipe.text.context_length) == (512, 12, 8, 77)
    train = recipe.train
    assert (train.batch_size, train.steps, train.warmup_steps) == (4096, 128000, 2500)
    assert (train.warmup_lr, train.lr, train.weight_decay) == (1e-4, 1e-3, 0.1)
    assert (train.betas, train.eps) == ((0.9, 0.98), 1e-8)
    assert recipe.nearest_neighbor.queue_size == 65536
    assert recipe.logit_scale.min == 3.0
    views = recipe.views.image
    assert (views.scale, views.jitter, views.grayscale_prob, views.blur_prob) == (
        (0.2, 1.0),
        (0.4, 0.4, 0.4, 0.1),
        0.2,
        0.5,
    )


@pytest.mark.parametrize(
    ("weights", "images", "texts"),
    [
        ({"contrastive": 1}, 1, 1),
        ({"contrastive": 1, "simclr": 1}, 2, 1),
        ({"contrastive": 1, "simsiam": 1}, 2, 1),
        ({"multi_view": 1}, 2, 2),
        ({"nearest_neighbor": 1}, 2, 2),
        ({"late_interaction": 1}, 1, 1),
    ],
)
def test_only_the_views_that_a_term_needs_are_made(weights: dict[str, float], images: int, texts: int) -> None:
    recipe = Recipe(weights=Weights(**weights))
    assert (recipe.image_view_count, recipe.text_view_count) == (images, texts)
    if {"simclr", "simsiam"}.isdisjoint(weights):
        one = Recipe(weights=Weights(**weights), views=Views(image_count=1))
        assert (one.image_view_count, one.text_view_count) == (1, texts)


def test_a_recipe_extends_another_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("extends: declip\nseed: 7\ntrain: {steps: 11}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ntrain: {batch: 9}\nweights: {contrastive: 2}\n")
    recipe = load_recipe(tmp_path / "mine.yaml", {"train.lr": "0.5", "image.size": 48})
    assert (recipe.name, recipe.seed, recipe.train.steps, recipe.train.batch_size) == ("mine", 7, 11, 9)
    assert (recipe.train.lr, recipe.image.size) == (0.5, 48)
    assert recipe.loss_weights.active() == ("contrastive",), "weights are named whole, not merged"


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ({"data.source": "pairs.jsonl"}, {}),
        ({"data": {"source": "pairs.jsonl"}}, {}),
        ({"data.source": ["a.csv", "b.csv"]}, {}),
        ({"data.source": "pairs.jsonl", "evaluation.retrieval": "[h.csv]"}, {"retrieval": ("h.csv",)}),
        ({"evaluation.retrieval": ["h.csv"], "data.source": "pairs.jsonl"}, {"retrieval": ("h.csv",)}),
        ({"evaluation": {"retrieval": ["h.csv"]}, "data.source": "pairs.jsonl"}, {"retrieval": ("h.csv",)}),
        ({"data.source": "builtin:emoji", "seed": 3}, None),
        ({"evaluation.retrieval": ["h.csv"]}, {**DEMO_SETS, "retrieval": ("h.csv",)}),
    ],
)
def test_a_recipes_evaluation_sets_hold_for_its_own_source(overrides: dict[str, Any], kept: dict[str, Any]) -> None:
    recipe = load_recipe("declip", overrides)
    assert recipe.evaluation == Evaluation(**(DEMO_SETS if kept is None else kept))


def test_a_child_recipe_with_a_source_of_its_own_has_its_own_evaluation_sets(tmp_path: Path) -> None:
    (tmp_path / "bare.yaml").write_text("extends: declip\ndata: {source: a.csv}\n")
    (tmp_path / "mine.yaml").write_text("extends: bare.yaml\nevaluation: {retrieval: [h.csv]}\n")
    (tmp_path / "both.yaml").write_text("extends: clip\ndata: {source: a.csv}\nevaluation: {retrieval: [h.csv]}\n")
    (tmp_path / "longer.yaml").write_text("extends: both.yaml\ndata: {source: a.csv}\ntrain: {steps: 9}\n")
    assert load_recipe(tmp_path / "bare.yaml").evaluation == Evaluation()
    for name in ("mine", "both", "longer"):
        assert load_recipe(tmp_path / f"{name}.yaml").evaluation == Evaluation(retrieval=("h.csv",)), name


def test_an_override_of_one_weight_keeps_the_others() -> None:
    weights = load_recipe("declip", {"loss_weights.simsiam": "0"}).weights
    assert (loss_weights.simsiam, loss_weights.multi_view) == (0, 0.3)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("declop", {}, "Unknown recipe 'declop'. Did you mean 'declip'"),
        ("clip", {"train.stepps": "5"}, "Unknown recipe key 'train.stepps'. Did you mean 'train.steps'"),
        ("clip", {"trian.steps": "5"}, "Unknown recipe key 'trian'. Did you mean"),
        ("clip", {"train.steps": "many"}, "train.steps='many': input should be a valid integer"),
        ("clip", {"train.batch_size": "1"}, "train.batch_size=1: input should be greater than or equal to 2"),
        ("clip", {"loss_weights.contrastive": "0"}, "every weight is 0"),
        ("clip", {"text.heads": "3"}, "text.width 128 is not a multiple of text.heads 3"),
        ("clip", {"train.warmup_lr": "1"}, "warmup_lr 1.0 is above train.lr"),
        ("declip", {"views.image_count": "1"}, "simsiam compares two views of an image, and views.image_count is 1"),
        ("slip", {"views.image_count": "1"}, "simclr compares two views of an image, and views.image_count is 1"),
        (
            "clip",
            {"views.image_count": "1", "views.contrastive_view": "{}"},
            "views.contrastive_view is a view beside two others",
        ),
        ("clip", {"views.image_count": "3"}, "views.image_count=3: input should be 1 or 2"),
        ("missing.yaml", {}, "There is no recipe file 'missing.yaml'"),
    ],
)
def test_a_mistake_is_named(name: str, overrides: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(name, overrides)
    assert message in str(caught.value)


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").write_text("extends: loop.yaml\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    for name, message in (("loop", "extends itself"), ("list", "must be a mapping"), ("broken", "not valid YAML")):
        with pytest.raises(UserError, match=message):
            load_recipe(tmp_path / f"{name}.yaml")


def test_overrides_are_key_equals_value() -> None:
    assert parse_overrides(["a.b=1", "c=x=y"]) == {"a.b": "1", "c": "x=y"}
    with pytest.raises(UserError, match="Write key=value"):
        parse_overrides(["steps"])


def test_every_weight_is_a_term() -> None:
    assert tuple(Weights.model_fields) == TERMS


def test_the_default_image_tower_exists() -> None:
    from declip.models.image_tower import SMALL_TOWERS

    assert Recipe().image.model in SMALL_TOWERS
