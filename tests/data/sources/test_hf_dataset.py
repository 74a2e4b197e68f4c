"""Datasets of Hugging Face's package: saved folders, objects, and the Hub, whose network is not used."""

import pickle

import pytest
from PIL import Image

import declip
from conftest import encoded
from data.tables import message, reason_of
from declip.data.columns import Columns
from declip.data.sources import hf_dataset
from declip.data.sources.open import open_source
from declip.evaluation.datasets import open_dataset
from indices import tiny_model

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def dataset():
    images = [
        {"bytes": encoded(Image.new("RGB", (8, 8), (shade,) * 3)), "path": f"{shade}.png"} for shade in (10, 20, 30, 10)
    ]
    images.append({"bytes": b"broken", "path": "lost.png"})
    features = datasets.Features(
        image=datasets.Image(), text=datasets.Value("string"), label=datasets.ClassLabel(names=["cat", "dog"])
    )
    rows = {"image": images, "text": ["a", "b", "c", "d", "e"], "label": [0, 1, 1, 0, 1]}
    return datasets.Dataset.from_dict(rows, features)


@pytest.fixture(scope="module")
def saved(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    dataset.save_to_disk(folder / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([1, 2])).save_to_disk(folder / "splits")
    return folder


@pytest.fixture(autouse=True)
def nothing_loaded():
    hf_dataset._load.cache_clear()


def check(source):
    assert len(source) == 4, "rows of one image are one pair"
    assert [source.captions(n) for n in range(4)] == [("a", "d"), ("b",), ("c",), ("e",)]
    assert source[2].image.getpixel((0, 0)) == (30, 30, 30)
    assert source.key(2) == "row 2"
    assert reason_of(source, 3) == "unreadable image"
    assert pickle.loads(pickle.dumps(source))[1].captions == ("b",)


def test_a_folder_of_save_to_disk(dataset, saved, monkeypatch, cache, tmp_path):
    check(open_source(saved / "one"))
    assert open_source(saved / "splits/test").captions(1) == ("c",)
    assert "train, test" in message(saved / "splits")
    dataset.select([1]).save_to_disk(tmp_path / "again")
    assert len(open_source(tmp_path / "again")) == 1
    dataset.select([1, 2]).save_to_disk(tmp_path / "again")
    assert len(open_source(tmp_path / "again")) == 2
    monkeypatch.setattr(hf_dataset, "LARGE_TABLE", 1)
    check(open_source(saved / "one"))
    assert list((cache / "tables/rows").glob("*.arrow"))


def test_a_dataset_that_is_open(dataset):
    check(open_source(dataset))
    assert open_source(dataset.select([2, 1])).captions(0) == ("c",)
    assert "splits a, b" in message(datasets.DatasetDict(a=dataset, b=dataset))
    renamed = dataset.rename_column("text", "words")
    assert "'words'" in message(renamed)
    assert open_source(renamed, Columns(caption="words")).captions(0) == ("a", "d")


def test_its_class_labels_are_classes(dataset, saved):
    for given in (dataset, str(saved / "one")):
        source = open_dataset(given).split("test")
        assert (source.class_names, source.labels.tolist()) == (("cat", "dog"), [0, 1, 1, 1])
    result = declip.evaluate(tiny_model(), dataset, templates="{}", progress=False)
    assert (result.n, result.classes, result.skipped) == (3, 2, {"unreadable image": 1})


def test_the_hub_by_name(dataset, monkeypatch):
    asked = []

    def load_dataset(name, **options):
        asked.append((name, options))
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    check(open_source("hf://datasets/me/set"))
    source = open_dataset("hf://datasets/me/set@v2:test[:5]").split("test")
    assert source.class_names == ("cat", "dog")
    assert asked == [
        ("me/set", {"revision": None, "split": "train"}),
        ("me/set", {"revision": "v2", "split": "test[:5]"}),
    ], "each is loaded once"
    assert not hf_dataset.names_dataset("hf://datasets/me/set/data/00000.tar")


def test_without_a_network_or_the_package_one_line_says_so(monkeypatch, saved):
    def load_dataset(name, **_):
        raise ConnectionError(f"Couldn't reach '{name}'\non the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = message("hf://datasets/me/none:test")
    assert "me/none" in text
    assert "network" in text
    assert "\n" not in text
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    assert "declip[datasets]" in message("hf://datasets/me/none:test")
    assert "declip[datasets]" in message(saved / "one")
