"""Sets with one folder per class: any folder, Caltech-101, ImageNet and its relatives."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from declip.evaluation.prompt_sets import read_prompts
from declip.evaluation.readers.images import sample_split
from evaluation import trees

WNIDS = list(read_prompts("imagenet").classes)


def _labels(source) -> list[int]:
    assert [trees.label_of(source[row].image) for row in range(len(source))] == source.labels.tolist()
    return source.labels.tolist()


class TestAnyFolder:
    def test_without_splits(self, tmp_path: Path) -> None:
        trees.paint(tmp_path / "shapes" / "red_square" / "deep" / "b.jpg", 1)
        trees.paint(tmp_path / "shapes" / "red_square" / "a.JPG", 1)
        trees.paint(tmp_path / "shapes" / "Cat" / "1.jpg", 0)
        trees.write(tmp_path / "shapes" / "Cat" / "notes.txt", "no image")
        trees.write(tmp_path / "shapes" / ".hidden" / "x.txt", "no class")
        dataset = open_dataset(f"folder:{tmp_path / 'shapes'}")
        assert (dataset.templates, dataset.metric) == ("plain", "top1")
        assert dataset.split("test").name == "shapes"
        assert list(dataset.openers) == ["test"]
        test = pickle.loads(pickle.dumps(dataset.split("test")))
        assert test.class_names == ("Cat", "red square")
        assert _labels(test) == [0, 1, 1]
        assert [test[row].key for row in range(3)] == ["Cat/1.jpg", "red_square/a.JPG", "red_square/deep/b.jpg"]

    @pytest.mark.parametrize("validation", ["val", "validation"])
    def test_splits_number_the_classes_alike(self, tmp_path: Path, validation: str) -> None:
        for split, classes in (("train", "abc"), (validation, "bc"), ("test", "c")):
            for name in classes:
                trees.paint(tmp_path / split / name / "1.jpg", "abc".index(name))
        dataset = open_dataset(f"folder:{tmp_path}")
        assert [_labels(dataset.split(each)) for each in ("train", "validation", "test")] == [[0, 1, 2], [1, 2], [2]]
        assert {dataset.split(each).class_names for each in dataset.openers} == {("a", "b", "c")}

    def test_validation_is_the_test_where_there_is_no_other(self, tmp_path: Path) -> None:
        for split, label in (("train", 0), ("train", 1), ("val", 1)):
            trees.paint(tmp_path / split / str(label) / f"{split}.jpg", label)
        dataset = open_dataset(f"folder:{tmp_path}")
        assert set(dataset.openers) == {"train", "test"}
        assert dataset.split("test")[0].key == "1/val.jpg"

    def test_what_cannot_be_measured(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no folder"):
            open_dataset(f"folder:{tmp_path / 'nowhere'}")
        trees.paint(tmp_path / "train" / "a" / "1.jpg", 0)
        with pytest.raises(UserError, match=r"the split train only.*'folder:.*train'"):
            open_dataset(f"folder:{tmp_path}")
        with pytest.raises(UserError, match="at least two; it has 1"):
            open_dataset(f"folder:{tmp_path / 'train'}")
        (tmp_path / "train" / "b").mkdir()
        (tmp_path / "val").mkdir()
        with pytest.raises(UserError, match="no pair in its test split"):
            open_dataset(f"folder:{tmp_path}")


class TestCaltech101:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        folder = tmp_path / "caltech101" / "101_ObjectCategories"
        names = sorted(read_prompts("caltech101").classes)
        for name in names:
            (folder / name).mkdir(parents=True)
        for label, count in ((1, 40), (101, 31), (2, 1)):
            for number in range(count):
                trees.paint(folder / names[label] / f"image_{number + 1:04d}.jpg", label)
        return tmp_path

    def test_thirty_of_each_class_and_all_the_rest(self, root: Path) -> None:
        dataset = open_dataset(f"caltech101:{root}")
        train, test = dataset.split("train"), dataset.split("test")
        assert np.bincount(_labels(train), minlength=102)[[1, 2, 101]].tolist() == [30, 1, 30]
        assert np.bincount(_labels(test), minlength=102)[[1, 2, 101]].tolist() == [10, 0, 1]
        keys = [{source[row].key for row in range(len(source))} for source in (train, test)]
        assert not keys[0] & keys[1]
        assert len(keys[0] | keys[1]) == 72
        assert dataset.metric == "mean_per_class"
        assert test.class_names[:3] == ("background", "off-center face", "centered face")
        assert test.class_names[-1] == "yin and yang symbol"
        # The same on every machine.
        assert [test[row].key for row in range(3)] == [f"Faces/image_00{number}.jpg" for number in ("06", "08", "13")]

    def test_other_classes(self, root: Path) -> None:
        folder = root / "caltech101" / "101_ObjectCategories"
        shutil.move(folder / "BACKGROUND_Google", folder / "unicorn")
        with pytest.raises(UserError, match=r"102 folders.*1 of them are missing \('BACKGROUND_Google'.*'unicorn'"):
            open_dataset(f"caltech101:{root}")
        with pytest.raises(UserError, match="caltech101/101_ObjectCategories"):
            open_dataset(f"caltech101:{root / 'caltech101'}")
        assert not (root / "caltech101" / "caltech101").exists()


def test_a_sample_split_takes_so_many_of_each_class_and_never_one_twice() -> None:
    labels = np.array([0] * 7 + [1] * 3 + [2] * 2 + [3])
    chosen = sample_split(labels, 2, 2)
    assert np.bincount(labels[chosen["train"]]).tolist() == [2, 2, 1, 1]
    assert np.bincount(labels[chosen["test"]]).tolist() == [2, 1, 1]
    assert not set(chosen["train"]) & set(chosen["test"])
    assert sample_split(labels, 2)["test"].size == 13 - 6
    assert sample_split(labels, 2, seed=1)["train"].tolist() != chosen["train"].tolist()


class TestImageNet:
    def test_folders_by_wordnet_number(self, tmp_path: Path) -> None:
        trees.class_folders(tmp_path / "val", WNIDS)
        dataset = open_dataset(f"imagenet:{tmp_path}")
        assert list(dataset.openers) == ["test"]
        test = dataset.split("test")
        assert _labels(test) == [0, 998, 999]
        assert (test.class_names[0], test.class_names[999]) == ("tench", "toilet paper")
        assert (dataset.templates, dataset.metric) == ("imagenet", "top1")
        trees.class_folders(tmp_path / "train", WNIDS)
        train = open_dataset(f"imagenet:{tmp_path}").split("train")
        assert _labels(train) == [0, 998, 999]
        assert train.root == tmp_path / "train"
        (tmp_path / "train" / WNIDS[5]).rmdir()
        with pytest.raises(UserError, match=rf"1 of them are missing \('{WNIDS[5]}'"):
            open_dataset(f"imagenet:{tmp_path}")

    def test_images_that_are_not_sorted_into_classes(self, tmp_path: Path) -> None:
        trees.paint(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", 0)
        with pytest.raises(UserError, match=r"1000 folders.*from 'n01440764' to 'n15075141'.*1000 of them are missing"):
            open_dataset(f"imagenet:{tmp_path}")
        with pytest.raises(UserError, match=r"val.*1000 classes"):
            open_dataset(f"imagenet:{tmp_path / 'val'}")

    def test_version_2_counts_its_folders_as_numbers(self, tmp_path: Path) -> None:
        for label in range(1000):
            (tmp_path / str(label)).mkdir()
        for label in (2, 10, 999):
            trees.paint(tmp_path / str(label) / "a.jpeg", label)
        test = open_dataset(f"imagenet-v2:{tmp_path}").split("test")
        assert _labels(test) == [10, 2, 999]  # read in the order of the folders' names
        assert [test.class_names[label] for label in test.labels] == ["brambling", "great white shark", "toilet paper"]

    @pytest.mark.parametrize(
        ("name", "count", "first", "last"),
        [
            ("imagenet-r", 200, "goldfish", "acorn"),
            ("imagenet-a", 200, "stingray", "acorn"),
            ("imagenet-sketch", 1000, "tench", "toilet paper"),
        ],
    )
    def test_relatives_choose_among_their_own_classes(self, tmp_path: Path, name, count, first, last) -> None:
        from declip.evaluation.readers.image_folder import wnids_of

        wnids = wnids_of(name)
        assert len(wnids) == count
        assert wnids == sorted(wnids)
        trees.class_folders(tmp_path, wnids)
        test = open_dataset(f"{name}:{tmp_path}").split("test")
        assert _labels(test) == [0, count - 2, count - 1]
        assert len(test.class_names) == count
        names = read_prompts("imagenet").classes
        assert test.class_names == tuple(names[wnid] for wnid in wnids)
        assert test.class_names[0] == first
        assert last in test.class_names
        trees.paint(tmp_path / "n00000000" / "a.jpg", 0)
        with pytest.raises(UserError, match=r"1 others are there \('n00000000'"):
            open_dataset(f"{name}:{tmp_path}")
