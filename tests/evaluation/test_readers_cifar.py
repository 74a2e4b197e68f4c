"""CIFAR-10 and CIFAR-100 from tiny pickled batches of the real layout."""

import pickle

import numpy as np
import pytest
from torchvision import datasets

from declip.errors import UserError
from declip.evaluation.datasets import open_dataset
from evaluation import trees

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
KINDS = {"cifar10": (datasets.CIFAR10, TEN), "cifar100": (datasets.CIFAR100, ["apple", "aquarium_fish", "lawn_mower"])}


@pytest.mark.parametrize("name", KINDS)
def test_images_labels_and_names(name: str, tmp_path, monkeypatch) -> None:
    kind, classes = KINDS[name]
    trees.cifar(tmp_path, monkeypatch, kind, classes)
    dataset = open_dataset(f"{name}:{tmp_path}")
    train, test = dataset.split("train"), pickle.loads(pickle.dumps(dataset.split("test")))
    assert not dataset.has("validation")
    assert (len(train), len(test)) == (20 if name == "cifar10" else 4, 4)
    last = len(classes) - 1
    assert test.labels.tolist() == [(last - row) % len(classes) for row in range(4)]
    assert test.labels.dtype == np.int64
    assert test.class_names == tuple(each.replace("_", " ") for each in classes)
    for source in (train, test):
        assert [trees.label_of(source[row].image) for row in range(len(source))] == source.labels.tolist()
    assert test[0].image.size == (32, 32)
    assert test.captions(0) == (test.class_names[last],)


def test_missing_and_changed_batches(tmp_path, monkeypatch) -> None:
    kind, classes = KINDS["cifar10"]
    trees.cifar(tmp_path, monkeypatch, kind, classes)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = batch.read_bytes()
    batch.unlink()
    with pytest.raises(UserError, match=r"cifar-10-batches-py/data_batch_3 is not there.*test_batch.*batches\.meta"):
        open_dataset(f"cifar10:{tmp_path}")
    # A pickle runs code when it is read, so one that is not the published file never is.
    batch.write_bytes(content + b"x")
    with pytest.raises(UserError, match="not what was published"):
        open_dataset(f"cifar10:{tmp_path}")
