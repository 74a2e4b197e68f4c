"""Opening what is measured on by its name."""

import pickle
from functools import partial

import pytest

from conftest import refuses
from declip.evaluation import datasets
from declip.evaluation.datasets import NAMED, Dataset, open_dataset, with_classes
from declip.training.assemble import resolve_recipe
from evaluation import trees


def test_a_named_set(tmp_path):
    trees.pets(tmp_path)
    dataset = open_dataset(f"pets:{tmp_path}")
    assert (dataset.name, dataset.templates, dataset.metric) == (f"pets:{tmp_path}", "pets", "mean_per_class")
    assert dataset.split("test").name == "pets"
    per_class = {name for name, named in NAMED.items() if named.metric == "mean_per_class"}
    assert per_class == {"pets", "flowers102", "caltech101", "aircraft"}
    refuses(r"'pets:.*' has no validation split\. It has: train, test\.", dataset.split, "validation")
    assert pickle.loads(pickle.dumps(dataset)).split("test").labels.tolist() == dataset.split("test").labels.tolist()


def test_a_split_is_opened_when_it_is_asked_for_and_once(painted):
    opened = []

    def make(which):
        opened.append(which)
        return painted(["red"] * (which != "validation"))

    dataset = Dataset("mine", {which: partial(make, which) for which in ("train", "validation", "test")})
    assert open_dataset(dataset) is dataset
    assert opened == ["test"]
    assert dataset.split("train") is dataset.split("train")
    assert opened == ["test", "train"]
    refuses("'mine' has no pairs in its validation split", dataset.split, "validation")


def test_an_open_source_is_a_test_split(painted):
    source = painted(["red", "blue"], classes=("red", "blue"), name="builtin:emoji-test")
    dataset = open_dataset(source)
    assert dataset.split("test") is source
    assert (dataset.name, dataset.templates, dataset.metric) == ("builtin:emoji-test", "emoji", "top1")
    assert open_dataset(painted(["red"])).templates == "plain"
    refuses("'painted' has no pairs", open_dataset, painted([]))


def test_splits_of_a_built_in_set(painted, monkeypatch):
    monkeypatch.setattr(datasets, "open_builtin", lambda name: painted(["red"], name=name))
    dataset = open_dataset("builtin:stamps-kinds")
    assert (dataset.name, dataset.templates) == ("builtin:stamps-kinds", "plain")
    assert {which: dataset.split(which).name for which in dataset.openers} == {
        "train": "stamps-kinds-train",
        "test": "stamps-kinds",
    }
    emoji = open_dataset("builtin:emoji-test")
    assert (list(emoji.openers), emoji.templates, emoji.split("test").name) == (["test"], "emoji", "emoji-test")
    assert open_dataset("builtin:icons-test").templates == "emoji"


def test_a_table_of_captions_may_have_splits(tmp_path):
    for number in range(4):
        trees.paint(tmp_path / f"{number}.png", number)
    rows = [f"{number}.png,caption {number},{'train' if number < 3 else 'test'}" for number in range(4)]
    trees.write(tmp_path / "table.csv", "\n".join(["image,caption,split", *rows]))
    for given in (str(tmp_path / "table.csv"), tmp_path / "table.csv"):
        dataset = open_dataset(given)
        assert dataset.name == str(given)
        assert {which: len(dataset.split(which)) for which in dataset.openers} == {"train": 3, "test": 1}
        assert dataset.split("test").captions(0) == ("caption 3",)
        assert resolve_recipe("clip", val=[given]).evaluation.retrieval == (str(given),)


def test_a_folder_with_captions_is_still_one(tmp_path):
    trees.paint(tmp_path / "a.jpg", 3)
    trees.write(tmp_path / "a.txt", "one\ntwo\n")
    dataset = open_dataset(str(tmp_path))
    assert list(dataset.openers) == ["test"]
    assert dataset.split("test").captions(0) == ("one", "two")
    refuses("has no classes", with_classes, dataset.split("test"))
    refuses("label_column", open_dataset, [(tmp_path / "a.jpg", "one")], label_column="label")


@pytest.mark.parametrize(
    ("on", "message"),
    [
        ("pet:/data/x", "'pet'.*'pets'.*cifar10"),
        ("pets:", "'pets:PATH'"),
        ("pets:/nowhere/at/all", "'/nowhere/at/all'.*oxford-iiit-pet/"),
        ("builtin:nothing", "Unknown built-in set 'nothing'"),
        ("C:/nowhere", "does not exist"),
    ],
)
def test_what_cannot_be_opened(on, message):
    refuses(message, open_dataset, on)
