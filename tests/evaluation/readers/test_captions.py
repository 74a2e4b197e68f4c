"""COCO and Flickr30k captions from tiny trees of the real layouts."""

import json
import pickle
from pathlib import Path

import pytest

from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from evaluation import trees


def _rows(source) -> dict[str, tuple[str, ...]]:
    return {source[row].key: source.captions(row) for row in range(len(source))}


def _karpathy(path: Path, rows: list[tuple[str, str, str]]) -> None:
    images = []
    for split, folder, name in rows:
        sentences = [{"raw": f"{name} one", "tokens": []}, {"raw": f"  {name}\n two. ", "tokens": []}]
        place = {"filepath": folder} if folder else {}
        images.append({"split": split, "filename": name, "sentences": sentences} | place)
    trees.write(path, json.dumps({"images": images, "dataset": "x"}))


def test_coco_in_karpathys_splits(tmp_path: Path) -> None:
    rows = [
        ("test", "val2014", "COCO_val2014_000000391895.jpg"),
        ("restval", "val2014", "b.jpg"),
        ("val", "val2014", "c.jpg"),
        ("train", "train2014", "d.jpg"),
    ]
    _karpathy(tmp_path / "dataset_coco.json", rows)
    for label, (_, folder, name) in enumerate(rows):
        trees.paint(tmp_path / folder / name, label)
    dataset = open_dataset(f"coco:{tmp_path}")
    test = pickle.loads(pickle.dumps(dataset.split("test")))
    name = rows[0][2]
    assert _rows(test) == {f"val2014/{name}": (f"{name} one", f"{name} two.")}
    assert trees.label_of(test[0].image) == 0
    assert list(_rows(dataset.split("train"))) == ["val2014/b.jpg", "train2014/d.jpg"]
    assert list(_rows(dataset.split("validation"))) == ["val2014/c.jpg"]
    assert test.labels is None


def test_coco_without_the_training_images(tmp_path: Path) -> None:
    _karpathy(tmp_path / "dataset_coco.json", [("test", "val2014", "a.jpg")])
    trees.paint(tmp_path / "val2014" / "a.jpg", 0)
    assert set(open_dataset(f"coco:{tmp_path}").openers) == {"validation", "test"}


@pytest.mark.parametrize("place", ["annotations/captions_val2017.json", "captions_val2017.json"])
def test_coco_2017(tmp_path: Path, place: str) -> None:
    tree = {
        "images": [{"id": 9, "file_name": "000000000009.jpg"}, {"id": 4, "file_name": "000000000004.jpg"}],
        "annotations": [
            {"image_id": 4, "id": 1, "caption": "A four."},
            {"image_id": 9, "id": 2, "caption": "A nine. "},
            {"image_id": 4, "id": 3, "caption": "Another four."},
        ],
    }
    trees.write(tmp_path / place, json.dumps(tree))
    for name in ("000000000009.jpg", "000000000004.jpg"):
        trees.paint(tmp_path / "val2017" / name, 0)
    test = open_dataset(f"coco:{tmp_path}").split("test")
    assert _rows(test) == {"000000000009.jpg": ("A nine.",), "000000000004.jpg": ("A four.", "Another four.")}


@pytest.mark.parametrize("folder", ["flickr30k-images", "flickr30k_images", "Images", "images"])
def test_flickr30k_in_karpathys_splits(tmp_path: Path, folder: str) -> None:
    rows = [("train", "", "1.jpg"), ("test", "", "2.jpg"), ("val", "", "3.jpg")]
    _karpathy(tmp_path / "dataset_flickr30k.json", rows)
    for label, (_, _, name) in enumerate(rows):
        trees.paint(tmp_path / folder / name, label)
    dataset = open_dataset(f"flickr30k:{tmp_path}")
    for which, name, label in (("train", "1.jpg", 0), ("test", "2.jpg", 1), ("validation", "3.jpg", 2)):
        source = dataset.split(which)
        assert _rows(source) == {name: (f"{name} one", f"{name} two.")}
        assert trees.label_of(source[0].image) == label


LINES = {
    "results_20130124.token": '7.jpg#0\tTwo "young" guys , one | bar .\n7.jpg#1\tThey stand .\n'
    '8.jpg#0\t"A dog .\n9.jpg#0\tGrass .\n',
    "results.csv": 'image_name| comment_number| comment\n7.jpg| 0| Two "young" guys , one | bar .\n'
    '7.jpg| 1| They stand .\n8.jpg| 0|"A dog .\n9.jpg| 0| Grass .\n',
}


@pytest.mark.parametrize("name", LINES)
def test_flickr30k_in_one_list(tmp_path: Path, name: str) -> None:
    trees.write(tmp_path / name, LINES[name])
    for label, image in enumerate(("7.jpg", "8.jpg", "9.jpg")):
        trees.paint(tmp_path / "flickr30k-images" / image, label)
    dataset = open_dataset(f"flickr30k:{tmp_path}")
    assert list(dataset.openers) == ["test"]
    assert _rows(dataset.split("test")) == {
        "7.jpg": ('Two "young" guys , one | bar .', "They stand ."),
        "8.jpg": ('"A dog .',),
        "9.jpg": ("Grass .",),
    }


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset_coco\.json with val2014/; or annotations/captions_val2017\.json"):
        open_dataset(f"coco:{tmp_path}")
    trees.write(tmp_path / "dataset_flickr30k.json", "{}")
    with pytest.raises(UserError, match=r"dataset_flickr30k\.json with flickr30k-images/"):
        open_dataset(f"flickr30k:{tmp_path}")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="damaged"):
        open_dataset(f"flickr30k:{tmp_path}")
    (tmp_path / "dataset_flickr30k.json").unlink()
    trees.write(tmp_path / "results_20130124.token", "7.jpg#0 no tab\n")
    with pytest.raises(UserError, match="without a tab"):
        open_dataset(f"flickr30k:{tmp_path}")
