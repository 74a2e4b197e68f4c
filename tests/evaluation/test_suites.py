"""The table of eleven sets on tiny trees, and the published rows below it."""

import json

import pytest
import torch
from torch import nn
from torchvision import datasets

from conftest import refuses
from declip.evaluation.protocols import SETS, Options, evaluate_suite
from evaluation import trees

KNOWN = {name: label for label, name in enumerate(trees.TEN)} | {
    "abyssinian": 0, "american bulldog": 0, "great pyrenees": 2, "banded": 0, "polka-dotted": 1, "zigzagged": 2,
}  # fmt: skip
"""A name to the label whose color the model takes it for: right but for the bulldog."""


class NameModel(nn.Module):
    """Knows the color of each class by its name; a feature is one-hot."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def preprocess(self, images):
        labels = torch.tensor([trees.label_of(image) for image in images], dtype=torch.float32)
        return labels[:, None, None, None].expand(-1, 3, 2, 2)

    def _feature(self, labels):
        return self.gain * nn.functional.one_hot(labels.long(), 12).float()

    def encode_image(self, images):
        return self._feature(images[:, 0, 0, 0])

    encode_backbone = encode_image

    def tokenize(self, texts):
        found = [[label for name, label in KNOWN.items() if name in text.lower()] for text in texts]
        return torch.tensor([labels[-1] if labels else 11 for labels in found])[:, None]

    def encode_text(self, tokens):
        return self._feature(tokens[:, 0])


@pytest.fixture
def root(tmp_path, monkeypatch):
    trees.pets(tmp_path / "pets")
    trees.cifar(tmp_path / "cifar10", monkeypatch, datasets.CIFAR10, trees.TEN, count=10)
    trees.dtd(tmp_path / "dtd")
    trees.food101(tmp_path / "food101")
    (tmp_path / "food101" / "food-101" / "meta" / "test.json").unlink()
    return tmp_path


def test_each_set_by_its_own_metric_and_the_missing_ones_listed(root):
    found = evaluate_suite(NameModel(), f"paper11:{root}", "zero-shot", Options(progress=False))
    # Of the pets 3 of 3, 0 of 1 and 2 of 2 are right.
    assert found.values == pytest.approx({"cifar10": 1.0, "pets": 2 / 3, "dtd": 1.0})
    assert found.results["pets"].templates == "pets"
    assert found.results["pets"].top1 == pytest.approx(5 / 6)
    assert set(found.missing) == set(SETS) - set(found.results)
    assert "food-101/" in found.missing["food101"]
    assert str(root / "cars") in found.missing["cars"]
    row = json.loads(json.dumps(found.to_dict()))
    assert list(row["values"]) == ["cifar10", "pets", "dtd"]
    assert row["average"] == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert row["values"]["pets"] == pytest.approx(2 / 3)
    assert (row["results"]["pets"]["metric"], row["results"]["pets"]["n"]) == ("mean_per_class", 6)


@pytest.mark.parametrize(
    ("on", "task", "message"),
    [
        ("paper11:/x", "retrieval", "'retrieval'.*linear, zero-shot"),
        ("paper11:/nowhere", "zero-shot", "paper11.*'/nowhere/cifar10'"),
    ],
)
def test_what_is_not_a_suite_or_not_there(on, task, message):
    refuses(message, evaluate_suite, NameModel(), on, task)


def test_the_linear_probe_learns_on_train(root):
    found = evaluate_suite(NameModel(), f"paper11:{root}", "linear", Options(progress=False))
    assert found.values == {"cifar10": 1.0}
    assert "too few" in found.missing["pets"]
