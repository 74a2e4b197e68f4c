"""The table of eleven sets on tiny trees, and the published rows below it."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import datasets

from declip.errors import UserError
from declip.evaluation.protocols import SETS, Options, SuiteResult, evaluate_suite, published
from declip.evaluation.results import ZeroShotResult
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
    with pytest.raises(UserError, match=message):
        evaluate_suite(NameModel(), on, task)


def test_the_linear_probe_learns_on_train(root):
    found = evaluate_suite(NameModel(), f"paper11:{root}", "linear", Options(progress=False))
    assert found.values == {"cifar10": 1.0}
    assert "too few" in found.missing["pets"]


def test_published_averages_are_those_of_the_numbers():
    for task, count, methods in (("zero-shot", 11, 9), ("linear", 10, 5)):
        tree = published(task)
        assert len(tree["rows"]) == methods
        assert set(tree["sets"]) <= set(SETS)
        for row in tree["rows"]:
            assert len(row["values"]) == len(tree["sets"]) == count
            assert np.mean(row["values"]) == pytest.approx(row["average"], abs=0.1), row["name"]
        values = dict(zip(tree["sets"], next(r["values"] for r in tree["rows"] if r["name"] == "DeCLIP"), strict=True))
        assert (values["pets"], values["cifar10"]) == ((33.8, 66.7) if task == "zero-shot" else (72.2, 89.2))


def _markdown(*sets, task="zero-shot"):
    results = {on: ZeroShotResult(on, 100, 10, 0.5, 1.0, 0.4) for on in sets}
    missing = {on: "gone" for on in SETS if on not in sets}
    return SuiteResult(task, results, missing).markdown("mine")


def test_published_averages_are_over_the_sets_shown():
    text = _markdown("cifar10", "pets")
    lines = text.splitlines()
    assert lines[0] == "|  |  | C10 | Pets | average |"
    assert lines[2] == "| mine | measured | 50.0 | 40.0 | 45.0 |"
    assert "| DeCLIP | published | 66.7 | 33.8 | 50.2 |" in lines
    assert "2 of 11" in text
    assert "mean per class: Pets; the others top-1" in text
    assert "arXiv 2308.08428, Table 3" in text
    assert "not measured: dtd: gone" in text
    assert len([line for line in lines if "| published |" in line]) == 9


def test_averages_over_different_sets_are_distinguished():
    whole = _markdown(*SETS)
    assert "| CLIP | published | 63.7 |" in whole
    assert "| 31.8 |" in whole
    assert "| 2.7 | 40.3 | 41.7 |" in whole  # as published; the rounded numbers' own mean is 41.6
    linear = _markdown("cifar10", "imagenet", task="linear")
    assert "| CLIP | published | 86.5 |  | 86.5 (1 of 2) |" in linear
    assert "does not compare" in linear
    assert "| published |" not in _markdown("imagenet", task="linear")
