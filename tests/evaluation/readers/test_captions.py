"""COCO and Flickr30k captions from tiny trees of the real layouts."""

import json
import pickle
import shutil
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
    shutil.rmtree(tmp_path / "train2014")
    assert set(open_dataset(f"coco:{tmp_path}").openers) == {"validation", "test"}


@pytest.mark.parametrize("folder", ["flickr30k-images", "images"])
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


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset_coco\.json with val2014/"):
        open_dataset(f"coco:{tmp_path}")
    trees.write(tmp_path / "dataset_flickr30k.json", "{}")
    with pytest.raises(UserError, match=r"dataset_flickr30k\.json with flickr30k-images/"):
        open_dataset(f"flickr30k:{tmp_path}")
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match="damaged"):
        open_dataset(f"flickr30k:{tmp_path}")
