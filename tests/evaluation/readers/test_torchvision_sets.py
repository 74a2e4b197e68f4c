"""Sets that torchvision reads, from tiny trees of the real layout."""

import pickle
import shutil

import numpy as np
import pytest
from torchvision import datasets

from conftest import refuses
from declip.data.pair import BrokenPair
from declip.evaluation.datasets import NAMED, open_dataset
from evaluation import trees

KINDS = {
    "cifar10": (datasets.CIFAR10, trees.TEN),
    "cifar100": (datasets.CIFAR100, ["apple", "aquarium_fish", "lawn_mower"]),
}
SUN = ("abbey", "bakery/shop", "jail/indoor", "jail_cell", "theater/indoor_seats")


EXPECTED = {
    "pets": (["Abyssinian", "American Bulldog", "Great Pyrenees"], {"train": [0, 1, 2], "test": [2, 0, 0, 0, 1, 2]}),
    "flowers102": (None, {"train": [0, 59], "validation": [76, 15], "test": [101, 92]}),
    "cars": (list(trees.CARS), {"train": [2, 0], "test": [1, 2, 0]}),
    "aircraft": (list(trees.AIRCRAFT), {"train": [0, 3], "validation": [1], "test": [2, 0, 3]}),
    "food101": (["apple pie", "creme brulee", "waffles"], {"train": [2, 1, 0], "test": [2, 1, 0]}),
    "dtd": (["banded", "polka-dotted", "zigzagged"], {each: [2, 1, 0] for each in ("train", "validation", "test")}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_images_labels_and_names(name, tmp_path, monkeypatch):
    make = getattr(trees, name)
    make(tmp_path, monkeypatch) if name == "flowers102" else make(tmp_path)
    dataset = open_dataset(f"{name}:{tmp_path}")
    names, splits = EXPECTED[name]
    assert set(dataset.openers) == set(splits)
    for which, labels in splits.items():
        source = pickle.loads(pickle.dumps(dataset)).split(which)
        assert trees.labels_of(source) == labels
        assert source.labels.dtype == np.int64
        assert names is None or list(source.class_names) == names
        assert [source[row].captions for row in range(len(source))] == [(source.class_names[i],) for i in labels]
    if name == "flowers102":  # whose files only number the classes
        test = dataset.split("test")
        assert len(test.class_names) == 102
        assert [test.class_names[label] for label in test.labels] == ["blackberry lily", "air plant"]
    shutil.move(tmp_path / NAMED[name].files, tmp_path / "elsewhere")
    refuses(rf"'{name}:{tmp_path}'.*{NAMED[name].files}", open_dataset, f"{name}:{tmp_path}")


def test_labels_and_captions_need_no_image_and_a_broken_one_is_counted(tmp_path):
    trees.pets(tmp_path)
    images = tmp_path / "oxford-iiit-pet" / "images"
    (images / "Abyssinian_201.jpg").unlink()
    (images / "Abyssinian_202.jpg").write_bytes((images / "Abyssinian_203.jpg").read_bytes()[:200])
    test = open_dataset(f"pets:{tmp_path}").split("test")
    assert test.labels.tolist() == [2, 0, 0, 0, 1, 2]
    assert test.captions(1) == ("Abyssinian",)
    assert test.captions(1) == ("Abyssinian",)
    with pytest.raises(BrokenPair, match=r"missing image: oxford-iiit-pet/images/Abyssinian_201\.jpg"):
        test[1]
    with pytest.raises(BrokenPair):
        test[2]


@pytest.mark.parametrize("name", KINDS)
def test_cifar(name, tmp_path, monkeypatch):
    kind, classes = KINDS[name]
    trees.cifar(tmp_path, monkeypatch, kind, classes)
    dataset = open_dataset(f"{name}:{tmp_path}")
    train, test = dataset.split("train"), pickle.loads(pickle.dumps(dataset.split("test")))
    assert set(dataset.openers) == {"train", "test"}
    assert (len(train), len(test)) == (20 if name == "cifar10" else 4, 4)
    last = len(classes) - 1
    assert trees.labels_of(test) == [(last - row) % len(classes) for row in range(4)]
    assert test.class_names == tuple(each.replace("_", " ") for each in classes)
    trees.labels_of(train)
    assert test[0].image.size == (32, 32)
    assert test[0].captions == test.captions(0) == (test.class_names[last],)


def test_missing_and_changed_batches_of_cifar(tmp_path, monkeypatch):
    kind, classes = KINDS["cifar10"]
    trees.cifar(tmp_path, monkeypatch, kind, classes)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = batch.read_bytes()
    batch.unlink()
    refuses(r"incomplete.*cifar-10-batches-py/", open_dataset, f"cifar10:{tmp_path}")
    # A pickle runs code when it is read, so one that is not the published file never is.
    batch.write_bytes(content + b"x")
    refuses("cifar-10-batches-py", open_dataset, f"cifar10:{tmp_path}")


@pytest.mark.parametrize("place", ["SUN397/Partitions", "."])
def test_sun397_by_its_official_lists(tmp_path, place):
    base = tmp_path / "SUN397"
    trees.write(base / "ClassName.txt", "".join(f"/{name[0]}/{name}\n" for name in SUN))
    for label, name in enumerate(SUN):
        for number in "ac":
            trees.paint(base / name[0] / name / f"sun_{number}{label}.jpg", label)
    refuses(r"Training_01\.txt.*Partitions\.zip", open_dataset, f"sun397:{tmp_path}")
    lines = "".join(f"/{name[0]}/{name}/sun_{{}}{label}.jpg\n" for label, name in enumerate(SUN))
    trees.write(tmp_path / place / "Training_01.txt", lines.replace("{}", "a"))
    trees.write(tmp_path / place / "Testing_01.txt", lines.replace("{}", "c"))
    dataset = open_dataset(f"sun397:{tmp_path}")
    train, test = dataset.split("train"), dataset.split("test")
    assert trees.labels_of(train) == trees.labels_of(test) == [0, 1, 2, 3, 4]
    assert test.class_names == ("abbey", "bakery shop", "jail indoor", "jail cell", "theater indoor seats")
    assert (train[2].key, test[2].key) == ("j/jail/indoor/sun_a2.jpg", "j/jail/indoor/sun_c2.jpg")
    trees.write(tmp_path / place / "Testing_01.txt", "/z/zoo/sun_a.jpg\n")
    refuses("zoo", open_dataset, f"sun397:{tmp_path}")
