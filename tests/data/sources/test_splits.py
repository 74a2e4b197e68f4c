"""What is trained on: the train rows of a source and never the others, and several sources as one."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml

from conftest import TINY, refuses, tiny_tree
from data.fakes import KINDS, write, write_shards
from declip.data.sources.open import open_source
from declip.data.sources.shards import ShardSource
from declip.data.sources.splits import splits_of, training_part
from declip.data.sources.subset import Subset, groups_of, take
from declip.evaluation.datasets import open_dataset
from declip.models.dual_encoder import DualEncoder
from declip.recipe.load import load_recipe
from declip.recipe.schema import Recipe
from declip.supervision.objective import Objective
from declip.training.assemble import build_loader
from declip.training.pairs import open_training_source

ROWS = [
    ("a.png", "one", "train"),
    ("b.png", "two", "Test"),
    ("c.png", "three", " val "),
    ("d.png", "four", "training"),
]
NAMES = ("image", "caption", "Split")


def captions(source):
    return [source[index].captions()[0] for index in range(len(source))]


def places(source):
    return {name: found.tolist() for name, found in splits_of(source).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_trained_on_by_its_train_rows(folder, kind):
    path = write(folder / f"t.{kind}", ROWS, NAMES)
    source = open_source(path)
    assert places(source) == {"train": [0, 3], "validation": [2], "test": [1]}
    part = training_part(source)
    assert (part.name, captions(part)) == (f"t.{kind} (train)", ["one", "four"])
    assert captions(open_dataset(path).split("test")) == ["two"]
    # An image with rows in two splits is not trained on.
    again = open_source(write(folder / f"again.{kind}", [*ROWS, ("a.png", "five", "test")], NAMES))
    assert splits_of(again)["train"].tolist() == [3]
    assert (
        training_part(open_source(write(folder / f"all.{kind}", ROWS[:1], NAMES))).name
        == f"all.{kind}"
    )
    nothing = open_source(write(folder / f"none.{kind}", ROWS[1:3], NAMES))
    refuses(r"no training pairs: .*validation, test", training_part, nothing)


@pytest.mark.parametrize("kind", KINDS)
def test_cells_that_name_no_split(folder, kind):
    def opened(*cells):
        rows = [(*row[:2], cell) for row, cell in zip(ROWS, cells, strict=True)]
        return open_source(write(folder / f"t.{kind}", rows, NAMES))

    for cells in ("1234", [""] * 4):
        source = opened(*cells)
        assert training_part(source) is source
    for cell in ("", "tset"):
        refuses(rf"'Split'.*'{cell}'", splits_of, opened("train", "test", cell, "train"))


def test_unreadable_rows_are_in_each_split(folder):
    lines = [json.dumps(dict(zip(NAMES, row, strict=True))) for row in ROWS]
    (folder / "t.jsonl").write_text("\n".join([*lines, "{broken"]))
    source = open_source(folder / "t.jsonl")
    assert places(source) == {"train": [0, 3, 4], "validation": [2, 4], "test": [1, 4]}
    for name, rows in splits_of(source).items():  # but make no part of another split a test set
        assert {*splits_of(Subset(source, rows))} == {name}


def test_folders_lists_and_subsets_have_splits(folder):
    for which in ("train", "Val", "test"):
        (folder / "photos" / which).mkdir(parents=True)
        shutil.copy(folder / "a.png", folder / "photos" / which)
        (folder / "photos" / which / "a.txt").write_text(which)
    assert captions(training_part(open_source(folder / "photos"))) == ["train"]
    assert captions(open_dataset(folder / "photos").split("test")) == ["test"]
    assert {*splits_of(open_source(folder / "photos"))} == {"train", "validation", "test"}
    items = [dict(zip(NAMES, row, strict=True)) for row in ROWS]
    source = open_source(items)
    for part, expected in ((source, ["one", "four"]), (take(source, 4, 0), ["one", "four"])):
        assert captions(training_part(part)) == expected
    assert captions(training_part(Subset(source, np.arange(1, 4)))) == ["four"]
    # Not a list: reading an item may decode its image.
    numbered = type(
        "Items", (), {"__len__": lambda _: 4, "__getitem__": lambda _, index: items[index]}
    )()
    refuses(r"'Split'.*list", training_part, open_source(numbered))


@pytest.fixture
def shards(tmp_path, cache):
    return write_shards(tmp_path / "shards", (5, 9, 7))


def recipe_of(source, **data):
    return Recipe.model_validate({**TINY, "data": {"source": source, **data}})


def opened_for(source, **data):
    return open_training_source(recipe_of(source, **data).data, seed=0)


def test_a_list_of_sources_is_joined(shards, table):
    recipe = recipe_of([str(table), str(shards)])
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe
    assert recipe.data.label == f"{table} + {shards}"
    source = opened_for([str(table), str(shards)])
    assert (len(source), source.name) == (24 + 21, "shapes.jsonl + shards")
    assert len(opened_for([str(table), str(shards)], max_pairs=20)) == 20


def test_one_source_stays_what_it_was_without_rows_of_other_splits(folder, shards, table):
    rows = str(write(folder / "t.csv", ROWS, NAMES))
    assert captions(opened_for(rows)) == ["one", "four"]
    joined = opened_for([rows, str(shards)])
    assert (len(joined), joined[1].captions()) == (2 + 21, ("four",))
    assert len(opened_for(rows, max_pairs=2)) == 2
    assert recipe_of(str(table)).data.label == str(table)
    assert isinstance(opened_for(str(shards)), ShardSource)
    part = opened_for(str(table), max_pairs=9)
    assert part.indices.tolist() == sorted(
        np.random.default_rng((0, 24)).permutation(24)[:9].tolist()
    )
    problem = r"max_pairs=25, but 'shapes\.jsonl' has 24"
    refuses(problem, opened_for, str(table), max_pairs=25)


def test_a_group_is_refused_where_no_source_is_a_table(shards, table):
    grouped = {"columns": {"group": "image"}, "max_pairs": 9}
    for source in (str(shards), str(table.parent), [str(shards), str(shards)]):
        refuses(r"data\.columns\.group", opened_for, source, **grouped)
    for source in (str(table), [str(shards), str(table)]):
        assert groups_of(opened_for(source, **grouped)).any()


def test_a_milder_contrastive_view_is_one_more(table):
    mild = {
        "scale": [1.0, 1.0],
        "color_jitter_prob": 0,
        "grayscale_prob": 0,
        "blur_prob": 0,
        "hflip_prob": 0,
    }

    def views(contrastive):
        recipe = Recipe.model_validate(
            tiny_tree(table, "slip", views={"contrastive_view": contrastive})
        )
        model = DualEncoder(recipe)
        pairs = opened_for(str(table))
        with build_loader(pairs, model, Objective(recipe, model)) as loader:
            return next(loader).views

    three = views(mild)
    assert list(three) == ["contrastive", "first", "second"]
    assert (three["contrastive"].pixels[:, :, :2, :2] == 255).all(), (
        "a whole image keeps its white corners"
    )
    assert not torch.equal(three["first"].pixels, three["second"].pixels)
    assert list(views(None)) == ["first", "second"]


@pytest.mark.parametrize("source", [[{"source": "a", "weight": 2}], []])
def test_a_source_that_is_none_is_explained(source):
    refuses([f"data.source is {source}", "list"], load_recipe, "clip", {"data.source": source})
