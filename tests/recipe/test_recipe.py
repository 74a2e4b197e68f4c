from importlib import resources
from math import inf
from pathlib import Path

import pytest
import yaml

from conftest import refuses
from declip.data.plan import plan_views
from declip.io.yaml_dialect import read_yaml
from declip.recipe.checks import load_for_training
from declip.recipe.finetuning import read_overrides
from declip.recipe.load import (
    flat,
    load_recipe,
    parse_overrides,
    read_value,
    recipe_keys,
    recipe_names,
    synonyms,
    unknown_key,
)
from declip.recipe.schema import Evaluation, ImageTowerConfig, Recipe
from declip.supervision.objective import needs_of

DEMO_SETS = {
    "zero_shot": ("builtin:emoji-validation",),
    "retrieval": ("builtin:emoji-validation",),
    "final_zero_shot": (
        "builtin:emoji-test",
        "builtin:emoji-test-new",
        "builtin:emoji-validation-new",
    ),
    "final_retrieval": ("builtin:emoji-test",),
}


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_says_what_it_is(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
    text = (resources.files("declip.recipe.library") / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("#"), "a recipe begins with what it is and what was measured"
    if not name.startswith("demo-"):
        assert recipe.evaluation == Evaluation()


CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
FEW = {"contrastive": 0.15, "multi_view": 0.45, "simsiam": 0.2, "nearest_neighbor": 0.2}
SCALE = {"name", "data.source", "data.columns.image", "data.workers"}
SCALE |= {f"train.{key}" for key in ("batch_size", "steps", "lr", "warmup_lr", "warmup_steps")}
SCALE |= {"train.grad_cache_chunk", "train.evaluate_every"}


@pytest.mark.parametrize("method", ["clip", "slip", "filip", "declip", "defilip"])
def test_a_method_differs_from_its_published_run_in_scale_alone(method):
    ours, published = (
        flat(load_recipe(name).model_dump()) for name in (method, f"{method}-yfcc15m-vitb32")
    )
    different = {key for key in {*ours, *published} if ours.get(key) != published.get(key)}
    # Without its contrastive loss FILIP would not train the features that search compares.
    assert different - SCALE == ({"loss_weights.contrastive"} if method == "filip" else set())


@pytest.mark.parametrize(
    "name", [name for name in recipe_names() if name.startswith(("few-", "demo-", "finetune"))]
)
def test_recipes_that_nobody_published_have_clips_pixels(name):
    """In evaluation, and the interpolation in training too."""
    recipe = load_recipe(name)
    image, plan = recipe.image, plan_views(recipe, needs_of(recipe))
    assert (image.mean, image.std) == (plan.mean, plan.std) == CLIP
    assert image.resize == image.size
    assert {view.interpolation for view in plan.views} == {"bicubic"}


def test_the_resize_in_evaluation_follows_the_size():
    for size, resize in {224: 256, 288: 329, 32: 36}.items():
        recipe = load_recipe("clip-yfcc15m-vitb32", {"image.size": size})
        assert recipe.image.resize == resize, "timm's rounding"
    for side in range(16, 400, 7):
        for edge in range(side, 4 * side, 11):
            assert ImageTowerConfig(size=side, crop_pct=side / edge).resize == edge


def test_a_recipe_extends_another_file_and_an_override_changes_one_entry(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: declip\nseed: 7\ntrain: {steps: 11}\n")
    (tmp_path / "mine.yaml").write_text(
        "extends: base.yaml\ntrain: {batch_size: 9}\nloss_weights: {contrastive: 2}\n"
    )
    recipe = load_recipe(tmp_path / "mine.yaml", {"train.lr": "0.5", "image.size": 48})
    assert (recipe.name, recipe.seed, recipe.image.size) == ("mine", 7, 48)
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.lr) == (11, 9, 0.5)
    assert recipe.loss_weights == {"contrastive": 2}, "weights are replaced, not merged"
    short = load_recipe("demo-declip", {"train.batch_size": 9, "train": {"steps": 3}})
    assert short == load_recipe("demo-declip", {"train.batch_size": 9, "train.steps": 3}), (
        "sections are merged"
    )
    assert load_recipe("clip", {"data.source": Path("a.csv")}).data.source == "a.csv"
    recipe = load_recipe("clip", {"data.columns.caption": "title"})
    assert recipe.data.columns == {"image": "image", "caption": "title"}
    recipe = load_recipe("few-declip", {"loss_weights.simsiam": "0"})
    assert recipe.loss_weights == {**FEW, "simsiam": 0}
    assert "simsiam" not in recipe.active_losses


@pytest.mark.parametrize(
    ("overrides", "kept"),
    [
        ({"data.source": "pairs.jsonl"}, {}),
        (
            {"data.source": "pairs.jsonl", "evaluation.retrieval": ["h.csv"]},
            {"retrieval": ("h.csv",)},
        ),
        ({"data.source": "builtin:emoji", "seed": 3}, None),
        ({"evaluation.retrieval": ["h.csv"]}, {**DEMO_SETS, "retrieval": ("h.csv",)}),
    ],
)
def test_a_recipes_evaluation_sets_hold_for_its_own_source(overrides, kept):
    recipe = load_recipe("demo-declip", overrides)
    assert recipe.evaluation == Evaluation(**(DEMO_SETS if kept is None else kept))


def test_a_child_recipe_with_a_source_of_its_own_has_its_own_evaluation_sets(tmp_path):
    (tmp_path / "bare.yaml").write_text("extends: demo-declip\ndata: {source: a.csv}\n")
    (tmp_path / "mine.yaml").write_text("extends: bare.yaml\nevaluation: {retrieval: [h.csv]}\n")
    (tmp_path / "longer.yaml").write_text(
        "extends: mine.yaml\ndata: {source: a.csv}\ntrain: {steps: 9}\n"
    )
    assert load_recipe(tmp_path / "bare.yaml").evaluation == Evaluation()
    for name in ("mine", "longer"):
        found = load_recipe(tmp_path / f"{name}.yaml").evaluation
        assert found == Evaluation(retrieval=("h.csv",)), name


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"train.steps": "many"}, ("train.steps='many'", "integer")),
        ({"data": "pairs.csv"}, ("data='pairs.csv'", "recipes show")),
        ({"data.columns.captoin": "x"}, ("'captoin'", "'caption'", "caption, group, image")),
        ({"text.heads": "5"}, ("text.width 384", "text.heads 5")),
        ({"train.epochs": inf}, ("train.epochs=inf", "finite")),
        ({"train.report_to": "wand"}, r"Did you mean 'wandb'\?.*\w\.$"),
        ({"train.steps": True}, ("steps is true", "number")),
        (
            {"image.mean": [123.7, 116.3, 103.5]},
            ("image.mean.0=123.7", "less than or equal to 1"),
        ),
        ({"logit_scale.init": "20"}, ("logit_scale.init 20.0", "logarithms")),
        (
            {"views.image_second": False, "views.contrastive_view": {}},
            ("views.contrastive_view", "=false"),
        ),
    ],
)
def test_a_mistake_is_named(overrides, says):
    refuses(says, load_recipe, "few-clip", overrides)


def test_a_mistake_in_a_file_is_named(tmp_path):
    for text, says in (
        ("train: {steps: 3}\ntrain: {lr: 1.0e-3}\n", "'train' is given twice"),
        ("train.steps: 3\n", "write train: {steps: …} instead"),
        ("extends: mine.yaml\n", r"mine\.yaml.* extends itself"),
    ):
        (tmp_path / "mine.yaml").write_text(text)
        refuses(says, load_recipe, tmp_path / "mine.yaml")


def test_names_of_other_tools_and_typing_errors_lead_each_to_one_key():
    keys = {
        "learning_rate": "train.lr",
        "simclr.lr": "train.lr",
        "data.num_workers": "data.workers",
    }
    for given, meant in (*keys.items(), ("finetune.pretraind", "finetune.pretrained")):
        assert f"'{meant}'" in str(unknown_key(given))
    assert synonyms().keys() <= {*recipe_keys()}
    names = [name for given in synonyms().values() for name in given.split()]
    assert len(names) == len(set(names))


def test_one_string_is_a_list_of_one_and_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    given = {"evaluation.retrieval": "~/a.csv", "evaluation.zero_shot": "pets:~/pets"}
    given |= {"data.image_root": "~/images", "finetune.pretrained": "runs/~x"}
    recipe = load_recipe("clip", given)
    assert recipe.evaluation.retrieval == ("/home/somebody/a.csv",)
    assert recipe.evaluation.zero_shot == ("pets:/home/somebody/pets",)
    assert recipe.data.image_root == "/home/somebody/images"
    assert recipe.finetune.pretrained == "runs/~x"


def test_numbers_are_read_as_python_writes_them_and_text_stays_text():
    values = {
        "5e-4": 5e-4,
        "1E3": 1e3,
        "+2.5e+3": 2.5e3,
        "1_000": 1000,
        "010": 10,
        ".5": 0.5,
        "3.": 3.0,
    }
    values |= {text: text for text in ("1:30", "5e", "1.2.3", "0x10")} | {"[5e-4, 2]": [5e-4, 2]}
    for text, value in values.items():
        found = read_value("train.lr", text)
        assert (found, type(found)) == (value, type(value))
    words = ("name='5e-4'", "data.columns.caption='010'", "train.lr=5e-4")
    recipe = load_recipe("clip", parse_overrides(words))
    texts = {"name": "a: 📷", "data.columns.caption": "010", "data.columns.group": "[x"}
    tuned = load_recipe("finetune", read_overrides(texts))
    assert tuned.name == "a: 📷"
    assert tuned.data.columns == {"image": "image", "caption": "010", "group": "[x"}
    assert read_overrides({"train": {"batch_size": "16"}}) == {"train.batch_size": 16}
    again = Recipe.model_validate(read_yaml(recipe.to_yaml()))
    assert (again.name, again.data.columns["caption"], again.train.lr) == ("5e-4", "010", 5e-4)


def test_a_path_of_pairs_may_have_any_character(tmp_path):
    path = tmp_path / "a: 'b' # 📷.csv"
    path.touch()
    assert load_for_training("clip", data=path).data.source == str(path)


def test_values_are_replaced_by_dotted_key_and_what_was_given_stays():
    recipe = load_recipe("demo-clip", {"train.steps": 7})
    other = recipe.with_keys({"train.steps": 9, "data.max_pairs": 3, "embed_dim": 5})
    assert (other.train.steps, other.data.max_pairs, other.embed_dim) == (9, 3, 5)
    assert (recipe.train.steps, other.given) == (7, recipe.given)
    expected = flat(recipe.model_dump()) | {"train.steps": 9, "data.max_pairs": 3, "embed_dim": 5}
    assert flat(other.model_dump()) == expected
