"""Pets, flowers, cars, aircraft, food and textures from tiny trees of the real layout."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from declip.data.pair import BrokenPair
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from declip.evaluation.readers.fine_grained import READERS
from evaluation import trees


def _grow(name: str, root: Path, patch: pytest.MonkeyPatch) -> None:
    grow = getattr(trees, name)
    grow(root, patch) if name == "flowers102" else grow(root)


EXPECTED = {
    "pets": (["Abyssinian", "American Bulldog", "Great Pyrenees"], {"train": [0, 1, 2], "test": [2, 0, 0, 0, 1, 2]}),
    "flowers102": (None, {"train": [0, 59], "validation": [76, 15], "test": [101, 92]}),
    "cars": (list(trees.CARS), {"train": [2, 0], "test": [1, 2, 0]}),
    "aircraft": (list(trees.AIRCRAFT), {"train": [0, 3], "validation": [1], "test": [2, 0, 3]}),
    "food101": (["apple pie", "creme brulee", "waffles"], {"train": [2, 1, 0], "test": [2, 1, 0]}),
    "dtd": (["banded", "polka-dotted", "zigzagged"], {each: [2, 1, 0] for each in ("train", "validation", "test")}),
}


@pytest.mark.parametrize("name", READERS)
def test_images_labels_and_names(name: str, tmp_path: Path, monkeypatch) -> None:
    _grow(name, tmp_path, monkeypatch)
    dataset = open_dataset(f"{name}:{tmp_path}")
    names, splits = EXPECTED[name]
    assert dataset.name == f"{name}:{tmp_path}"
    assert set(dataset.openers) == set(splits)
    for which, labels in splits.items():
        source = pickle.loads(pickle.dumps(dataset.split(which)))
        assert source.labels.tolist() == labels
        assert source.labels.dtype == np.int64
        assert names is None or list(source.class_names) == names
        assert [trees.label_of(source[row].image) for row in range(len(source))] == labels
        assert [source[row].captions for row in range(len(source))] == [(source.class_names[i],) for i in labels]


def test_flowers_are_named_by_their_number(tmp_path: Path, monkeypatch) -> None:
    _grow("flowers102", tmp_path, monkeypatch)
    test = open_dataset(f"flowers102:{tmp_path}").split("test")
    assert len(test.class_names) == 102
    assert [test.class_names[label] for label in test.labels] == ["blackberry lily", "air plant"]


@pytest.mark.parametrize("name", READERS)
def test_a_missing_file_is_named_with_all_that_is_expected(name: str, tmp_path: Path, monkeypatch) -> None:
    _grow(name, tmp_path, monkeypatch)
    for gone in READERS[name].files:
        place = tmp_path / gone
        kept = tmp_path / "kept"
        shutil.move(place, kept)
        with pytest.raises(UserError) as error:
            open_dataset(f"{name}:{tmp_path}")
        said, _, expected = str(error.value).partition("Expected below that folder: ")
        assert f"{gone} is not there" in said
        assert expected == ", ".join(READERS[name].files) + "."
        shutil.move(kept, place)
    open_dataset(f"{name}:{tmp_path}")


def test_labels_and_captions_need_no_image_and_a_broken_one_is_counted(tmp_path: Path) -> None:
    trees.pets(tmp_path)
    images = tmp_path / "oxford-iiit-pet" / "images"
    (images / "Abyssinian_201.jpg").unlink()
    (images / "Abyssinian_202.jpg").write_bytes((images / "Abyssinian_203.jpg").read_bytes()[:200])
    test = open_dataset(f"pets:{tmp_path}").split("test")
    assert test.labels.tolist() == [2, 0, 0, 0, 1, 2]
    assert test.captions(1) == ("Abyssinian",)
    with pytest.raises(BrokenPair, match=r"missing image: oxford-iiit-pet/images/Abyssinian_201\.jpg"):
        test[1]
    with pytest.raises(BrokenPair):
        test[2]


def test_files_of_another_set_are_not_taken_for_it(tmp_path: Path, monkeypatch) -> None:
    trees.flowers102(tmp_path, monkeypatch)
    with (tmp_path / "flowers-102" / "setid.mat").open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="not what was published, or are damaged"):
        open_dataset(f"flowers102:{tmp_path}")
    trees.dtd(tmp_path)
    (tmp_path / "dtd" / "dtd" / "labels" / "test1.txt").write_text("no slash here\n")
    with pytest.raises(UserError, match=r"'dtd'.*damaged"):
        open_dataset(f"dtd:{tmp_path}")
