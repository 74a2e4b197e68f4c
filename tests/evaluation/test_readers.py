"""Public sets from tiny trees of the real layout: a folder per class, and those that torchvision reads."""

import pickle
import shutil

import numpy as np
import pytest
from torchvision import datasets

from conftest import refuses
from declip.evaluation import readers
from declip.evaluation.datasets import NAMED, open_dataset
from declip.evaluation.prompt_sets import read_prompts
from evaluation import trees

WNIDS = list(read_prompts("imagenet").classes)


def test_a_folder_without_splits(tmp_path):
    trees.paint(tmp_path / "shapes" / "red_square" / "deep" / "b.jpg", 1)
    trees.paint(tmp_path / "shapes" / "red_square" / "a.JPG", 1)
    trees.paint(tmp_path / "shapes" / "Cat" / "1.jpg", 0)
    trees.write(tmp_path / "shapes" / "Cat" / "notes.txt", "no image")
    trees.write(tmp_path / "shapes" / ".hidden" / "x.txt", "no class")
    dataset = open_dataset(f"folder:{tmp_path / 'shapes'}")
    assert list(dataset.openers) == ["test"]
    test = pickle.loads(pickle.dumps(dataset.split("test")))
    assert (test.name, test.class_names) == ("shapes", ("Cat", "red square"))
    assert trees.labels_of(test) == [0, 1, 1]
    assert [test[row].key for row in range(3)] == [
        "Cat/1.jpg",
        "red_square/a.JPG",
        "red_square/deep/b.jpg",
    ]


def test_splits_number_the_classes_alike(tmp_path):
    for split, classes in (("train", "abc"), ("validation", "bc"), ("test", "c")):
        for name in classes:
            trees.paint(tmp_path / split / name / "1.jpg", "abc".index(name))
    dataset = open_dataset(f"folder:{tmp_path}")
    labels = [trees.labels_of(dataset.split(each)) for each in ("train", "validation", "test")]
    assert labels == [[0, 1, 2], [1, 2], [2]]
    assert {dataset.split(each).class_names for each in dataset.openers} == {("a", "b", "c")}
    # Validation is the test where there is no other.
    shutil.rmtree(tmp_path / "test")
    dataset = open_dataset(f"folder:{tmp_path}")
    assert set(dataset.openers) == {"train", "test"}
    assert trees.labels_of(dataset.split("test")) == [1, 2]


def test_folders_that_cannot_be_measured(tmp_path):
    refuses("no folder", open_dataset, f"folder:{tmp_path / 'nowhere'}")
    trees.paint(tmp_path / "train" / "a" / "1.jpg", 0)
    refuses(r"has only train.*'folder:.*train'", open_dataset, f"folder:{tmp_path}")
    refuses("at least two; it has 1", open_dataset, f"folder:{tmp_path / 'train'}")
    (tmp_path / "train" / "b").mkdir()
    (tmp_path / "val").mkdir()
    refuses("no pairs in its test split", open_dataset, f"folder:{tmp_path}")


def test_caltech101_has_thirty_of_each_class_for_training_and_all_the_rest(tmp_path):
    folder = tmp_path / "caltech101" / "101_ObjectCategories"
    names = sorted(read_prompts("caltech101").classes)
    for name in names:
        (folder / name).mkdir(parents=True)
    for label, count in ((1, 40), (101, 31), (2, 1)):
        for number in range(count):
            trees.paint(folder / names[label] / f"image_{number + 1:04d}.jpg", label)
    dataset = open_dataset(f"caltech101:{tmp_path}")
    train, test = dataset.split("train"), dataset.split("test")
    assert np.bincount(trees.labels_of(train), minlength=102)[[1, 2, 101]].tolist() == [30, 1, 30]
    assert np.bincount(trees.labels_of(test), minlength=102)[[1, 2, 101]].tolist() == [10, 0, 1]
    keys = [{source[row].key for row in range(len(source))} for source in (train, test)]
    assert not keys[0] & keys[1]
    assert len(keys[0] | keys[1]) == 72
    assert test.class_names[:3] == ("background", "off-center face", "centered face")
    assert test.class_names[-1] == "yin and yang symbol"
    # The same on every machine.
    assert [test[row].key for row in range(3)] == [
        f"Faces/image_00{number}.jpg" for number in ("06", "08", "13")
    ]

    shutil.move(folder / "BACKGROUND_Google", folder / "unicorn")
    refuses(
        "102 folders.*1 are missing and 1 are unexpected.*'BACKGROUND",
        open_dataset,
        f"caltech101:{tmp_path}",
    )
    refuses(
        "caltech101/101_ObjectCategories", open_dataset, f"caltech101:{tmp_path / 'caltech101'}"
    )


@pytest.mark.parametrize(
    ("name", "folders"),
    [
        ("imagenet", WNIDS[:12]),
        ("imagenet-sketch", WNIDS[:12]),
        ("imagenet-a", WNIDS[1::300]),
        ("imagenet-v2", sorted(map(str, range(12)))),
    ],
)
def test_imagenet_and_its_variants(tmp_path, monkeypatch, name, folders):
    wnids = WNIDS[1::300] if name == "imagenet-a" else WNIDS[:12]
    monkeypatch.setattr(readers, "wnids_of", lambda _: wnids)
    root = tmp_path / "val" if name == "imagenet" else tmp_path
    trees.paint(root / "a.JPEG", 0)
    refuses(rf"{len(wnids)} folders.*{len(wnids)} are missing", open_dataset, f"{name}:{tmp_path}")
    for number, folder in enumerate(folders):
        trees.paint(root / folder / "a.JPEG", int(folder) if folder.isdecimal() else number)
    dataset = open_dataset(f"{name}:{tmp_path}")
    test = dataset.split("test")
    assert (list(dataset.openers), sorted(trees.labels_of(test))) == (
        ["test"],
        [*range(len(wnids))],
    )
    assert test.class_names == tuple(read_prompts("imagenet").classes[wnid] for wnid in wnids)
    trees.paint(root / "n00000000" / "a.jpg", 0)
    refuses(r"1 are unexpected \('n00000000'\)", open_dataset, f"{name}:{tmp_path}")
    if name == "imagenet":
        shutil.rmtree(root / "n00000000")
        (tmp_path / "train").symlink_to(root)
        assert trees.labels_of(open_dataset(f"imagenet:{tmp_path}").split("train")) == [*range(12)]


SUN = ("abbey", "bakery/shop", "jail/indoor", "jail_cell", "theater/indoor_seats")
EXPECTED = {
    "pets": (
        ["Abyssinian", "American Bulldog", "Great Pyrenees"],
        {"train": [0, 1, 2], "test": [2, 0, 0, 0, 1, 2]},
    ),
    "flowers102": (None, {"train": [0, 59], "validation": [76, 15], "test": [101, 92]}),
    "cars": (list(trees.CARS), {"train": [2, 0], "test": [1, 2, 0]}),
    "aircraft": (list(trees.AIRCRAFT), {"train": [0, 3], "validation": [1], "test": [2, 0, 3]}),
    "food101": (["apple pie", "creme brulee", "waffles"], {"train": [2, 1, 0], "test": [2, 1, 0]}),
    "dtd": (
        ["banded", "polka-dotted", "zigzagged"],
        {each: [2, 1, 0] for each in ("train", "validation", "test")},
    ),
    "cifar10": (
        trees.TEN,
        {"train": [(9 - row - n) % 10 for n in range(5) for row in range(4)], "test": [9, 8, 7, 6]},
    ),
    "cifar100": (
        ["apple", "aquarium fish", "lawn mower"],
        {"train": [2, 1, 0, 2], "test": [2, 1, 0, 2]},
    ),
}
FRUIT = ["apple", "aquarium_fish", "lawn_mower"]
MAKERS = {
    "flowers102": trees.flowers102,
    "cifar10": lambda root, patch: trees.cifar(root, patch, datasets.CIFAR10, trees.TEN),
    "cifar100": lambda root, patch: trees.cifar(root, patch, datasets.CIFAR100, FRUIT),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_images_labels_and_names(name, tmp_path, monkeypatch):
    MAKERS.get(name, lambda root, patch: getattr(trees, name)(root))(tmp_path, monkeypatch)
    dataset = open_dataset(f"{name}:{tmp_path}")
    names, splits = EXPECTED[name]
    assert set(dataset.openers) == set(splits)
    for which, labels in splits.items():
        source = pickle.loads(pickle.dumps(dataset)).split(which)
        assert trees.labels_of(source) == labels
        assert names is None or list(source.class_names) == names
        assert [source[row].captions() for row in range(len(source))] == [
            (source.class_names[i],) for i in labels
        ]
    if name == "flowers102":  # whose files only number the classes
        assert [source[row].captions() for row in range(2)] == [
            ("blackberry lily",),
            ("air plant",),
        ]
    shutil.move(tmp_path / NAMED[name].files, tmp_path / "elsewhere")
    refuses(rf"'{name}:{tmp_path}'.*{NAMED[name].files}", open_dataset, f"{name}:{tmp_path}")


def test_missing_and_changed_batches_of_cifar(tmp_path, monkeypatch):
    MAKERS["cifar10"](tmp_path, monkeypatch)
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
    assert test.class_names == (
        "abbey",
        "bakery shop",
        "jail indoor",
        "jail cell",
        "theater indoor seats",
    )
    assert (train[2].key, test[2].key) == ("j/jail/indoor/sun_a2.jpg", "j/jail/indoor/sun_c2.jpg")
    trees.write(tmp_path / place / "Testing_01.txt", "/z/zoo/sun_a.jpg\n")
    refuses("zoo", open_dataset, f"sun397:{tmp_path}")
