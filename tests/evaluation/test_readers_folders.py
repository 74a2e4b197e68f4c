"""Sets with one folder a class: any folder, Caltech-101, SUN397, ImageNet and its relatives."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from declip.evaluation.prompt_sets import read_prompts
from declip.evaluation.readers.splits import drawn_split
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

    def test_the_draw_is_the_same_elsewhere(self, root: Path) -> None:
        test = open_dataset(f"caltech101:{root}").split("test")
        assert [test[row].key for row in range(3)] == [
            "Faces/image_0006.jpg",
            "Faces/image_0008.jpg",
            "Faces/image_0013.jpg",
        ]

    def test_other_classes(self, root: Path) -> None:
        folder = root / "caltech101" / "101_ObjectCategories"
        shutil.move(folder / "BACKGROUND_Google", folder / "unicorn")
        with pytest.raises(UserError, match=r"102 folders.*1 of them are missing \('BACKGROUND_Google'.*'unicorn'"):
            open_dataset(f"caltech101:{root}")
        with pytest.raises(UserError, match="caltech101/101_ObjectCategories/ is not there"):
            open_dataset(f"caltech101:{root / 'caltech101'}")
        assert not (root / "caltech101" / "caltech101").exists()


class TestSUN397:
    CLASSES = ("abbey", "bakery/shop", "jail/indoor", "jail_cell", "theater/indoor_seats")

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        base = tmp_path / "SUN397"
        trees.write(base / "ClassName.txt", "".join(f"/{name[0]}/{name}\n" for name in self.CLASSES))
        for label, name in enumerate(self.CLASSES):
            for number in "abc":
                trees.paint(base / name[0] / name / f"sun_{number}{label}.jpg", label)
        return tmp_path

    def test_names_follow_the_folders_and_not_the_published_order(self, root: Path) -> None:
        test = open_dataset(f"sun397:{root}").split("test")
        assert test.class_names == ("abbey", "bakery shop", "jail indoor", "jail cell", "theater indoor seats")
        assert len(_labels(test)) == len(test)

    @pytest.mark.parametrize("place", ["SUN397", "SUN397/Partitions", "Partitions", "."])
    def test_the_official_lists(self, root: Path, place: str) -> None:
        lines = "".join(f"/{name[0]}/{name}/sun_{{}}{label}.jpg\n" for label, name in enumerate(self.CLASSES))
        trees.write(root / place / "Training_01.txt", lines.replace("{}", "a"))
        trees.write(root / place / "Testing_01.txt", lines.replace("{}", "c"))
        dataset = open_dataset(f"sun397:{root}")
        assert _labels(dataset.split("train")) == _labels(dataset.split("test")) == [0, 1, 2, 3, 4]
        assert dataset.split("train")[2].key == "j/jail/indoor/sun_a2.jpg"
        assert dataset.split("test")[2].key == "j/jail/indoor/sun_c2.jpg"

    def test_a_drawn_split_does_not_hang_on_the_order_of_the_disk(self, root: Path, monkeypatch) -> None:
        found = open_dataset(f"sun397:{root}").split("test")
        rglob = Path.rglob
        monkeypatch.setattr(Path, "rglob", lambda self, pattern: sorted(rglob(self, pattern), reverse=True))
        again = open_dataset(f"sun397:{root}").split("test")
        keys = [found[row].key for row in range(len(found))]
        assert keys == [again[row].key for row in range(len(again))]
        assert keys == sorted(keys)

    def test_missing_and_strange(self, root: Path) -> None:
        for name in ("Training_01.txt", "Testing_01.txt"):
            trees.write(root / "SUN397" / name, "/z/zoo/sun_a.jpg\n")
        with pytest.raises(UserError, match="names the class 'zoo'"):
            open_dataset(f"sun397:{root}")
        (root / "SUN397" / "ClassName.txt").unlink()
        with pytest.raises(UserError, match=r"SUN397/ClassName\.txt is not there"):
            open_dataset(f"sun397:{root}")


def test_a_drawn_split_takes_so_many_of_each_class_and_never_one_twice() -> None:
    labels = np.array([0] * 7 + [1] * 3 + [2] * 2 + [3])
    drawn = drawn_split(labels, 2, 2)
    assert np.bincount(labels[drawn["train"]]).tolist() == [2, 2, 1, 1]
    assert np.bincount(labels[drawn["test"]]).tolist() == [2, 1, 1]
    assert not set(drawn["train"]) & set(drawn["test"])
    assert drawn_split(labels, 2)["test"].size == 13 - 6
    assert drawn_split(labels, 2, seed=1)["train"].tolist() != drawn["train"].tolist()


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
        with pytest.raises(UserError, match="val/ is not there"):
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
