"""The table of eleven sets on tiny trees, and the published rows below it."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torchvision import datasets

from declip.errors import UserError
from declip.evaluation.protocols import Options
from declip.evaluation.results import ZeroShotResult
from declip.evaluation.suites import SUITES, SuiteResult, SuiteRow, evaluate_suite, is_suite, published
from evaluation import trees

TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
KNOWN = {name: label for label, name in enumerate(TEN)} | {
    "abyssinian": 0, "american bulldog": 0, "great pyrenees": 2, "banded": 0, "polka-dotted": 1, "zigzagged": 2,
}  # fmt: skip
"""A name to the label whose color the model takes it for: right but for the bulldog."""


class NameModel(nn.Module):
    """Knows the color of each class by its name; a feature is one-hot."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def preprocess(self, images):
        labels = torch.tensor([trees.label_of(image) for image in images], dtype=torch.float32)
        return labels[:, None, None, None].expand(-1, 3, 2, 2)

    def _feature(self, labels: Tensor) -> Tensor:
        return self.gain * nn.functional.one_hot(labels.long(), 12).float()

    def encode_image(self, images: Tensor) -> Tensor:
        return self._feature(images[:, 0, 0, 0])

    encode_backbone = encode_image

    def tokenize(self, texts: list[str]) -> Tensor:
        found = [[label for name, label in KNOWN.items() if name in text.lower()] for text in texts]
        return torch.tensor([labels[-1] if labels else 11 for labels in found])[:, None]

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self._feature(tokens[:, 0])


@pytest.fixture
def root(tmp_path: Path, monkeypatch) -> Path:
    trees.pets(tmp_path / "pets")
    trees.cifar(tmp_path / "cifar10", monkeypatch, datasets.CIFAR10, TEN, count=10)
    trees.dtd(tmp_path / "dtd")
    trees.food101(tmp_path / "food101")
    (tmp_path / "food101" / "food-101" / "meta" / "test.json").unlink()
    return tmp_path


def test_each_set_by_its_own_metric_and_the_missing_ones_listed(root: Path) -> None:
    found = evaluate_suite(NameModel(), f"paper11:{root}", "zero-shot", Options(progress=False))
    assert found.measured == ("cifar10", "pets", "dtd")
    # Of the pets 3 of 3, 0 of 1 and 2 of 2 are right.
    values = {row.dataset: row.value for row in found.rows}
    assert values == pytest.approx({"cifar10": 1.0, "pets": 2 / 3, "dtd": 1.0})
    pets = found.rows[1]
    assert (pets.metric, pets.result.templates) == ("mean_per_class", "pets")
    assert pets.result.top1 == pytest.approx(5 / 6)
    assert found.average == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert set(found.missing) == set(SUITES["paper11"]) - set(found.measured)
    assert "food-101/" in found.missing["food101"]
    assert found.missing["cars"] == f"There is no folder '{root / 'cars'}'."
    row = json.loads(json.dumps(found.to_dict()))
    assert row["averaged_over"] == ["cifar10", "pets", "dtd"]
    assert row["rows"][1]["value"] == pytest.approx(2 / 3)
    assert row["rows"][1]["result"]["n"] == 6


def test_what_is_not_a_suite_or_not_there(root: Path, tmp_path_factory) -> None:
    model = NameModel()
    for on, task, message in (
        (f"paper12:{root}", "zero-shot", "Unknown suite 'paper12'.*Did you mean 'paper11'"),
        (f"paper11:{root}", "knn", "Unknown task of a suite 'knn'.*linear, zero-shot"),
        ("paper11:/nowhere", "zero-shot", "no folder '/nowhere'.*PATH/cifar10"),
        (f"paper11:{tmp_path_factory.mktemp('empty')}", "zero-shot", "Not one dataset of 'paper11'.*no folder"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate_suite(model, on, task)
    assert is_suite("paper11:/x")
    assert not is_suite("pets:/x")
    assert not is_suite("paper11")


def test_the_linear_probe_learns_on_train(root: Path) -> None:
    found = evaluate_suite(NameModel(), f"paper11:{root}", "linear", Options(progress=False, cache=False))
    assert found.rows[0].dataset == "cifar10"
    assert found.rows[0].value == 1.0
    assert found.measured == ("cifar10",)
    assert "too few" in found.missing["pets"]


def _row(on: str, top1: float, per_class: float, metric: str = "top1") -> SuiteRow:
    return SuiteRow(on, metric, ZeroShotResult(on, 100, 10, top1, 1.0, per_class))


def _result(*sets: str, task: str = "zero-shot") -> SuiteResult:
    rows = tuple(_row(on, 0.5, 0.4, "mean_per_class" if on == "pets" else "top1") for on in sets)
    return SuiteResult("paper11", task, rows, {on: "gone" for on in SUITES["paper11"] if on not in sets})


def test_published_averages_are_those_of_the_numbers() -> None:
    for task, count, methods in (("zero-shot", 11, 9), ("linear", 10, 5)):
        _, rows = published("paper11", task)
        assert len(rows) == methods
        for row in rows:
            assert len(row.values) == count
            assert np.mean(list(row.values.values())) == pytest.approx(row.average, abs=0.001), row.name
    declip = next(row for row in published("paper11", "zero-shot")[1] if row.name == "DeCLIP")
    assert (declip.values["imagenet"], declip.values["pets"]) == pytest.approx((0.432, 0.338))
    probe = next(row for row in published("paper11", "linear")[1] if row.name == "DeCLIP")
    assert (probe.values["caltech101"], probe.values["cifar10"]) == pytest.approx((0.879, 0.892))
    assert set(SUITES["paper11"]) == set(declip.values)


def test_published_averages_are_over_the_sets_shown() -> None:
    text = _result("cifar10", "pets").markdown("mine")
    lines = text.splitlines()
    assert lines[0] == "|  |  | C10 | Pets | average |"
    assert lines[2] == "| mine | measured | 50.0 | 40.0 | 45.0 |"
    assert "| DeCLIP | published | 66.7 | 33.8 | 50.2 |" in lines
    assert "over the 2 datasets shown, not the suite's 11" in text
    assert "mean per class: Pets; the others top-1" in text
    assert "arXiv 2308.08428, Table 3" in text
    assert "not measured: dtd: gone" in text
    assert len([line for line in lines if "| published |" in line]) == 9


def test_averages_over_different_sets_are_distinguished() -> None:
    whole = _result(*SUITES["paper11"]).markdown()
    assert "datasets shown" not in whole
    assert "| CLIP | published | 63.7 |" in whole
    assert "| 31.8 |" in whole
    assert "| 2.7 | 40.3 | 41.7 |" in whole  # as published; the rounded numbers' own mean is 41.6
    linear = _result("cifar10", "imagenet", task="linear").markdown()
    assert "| CLIP | published | 86.5 |  | 86.5 (1 of 2) |" in linear
    assert "nothing is published for ImageNet" in linear
    assert "measured average without ImageNet: 50.0" in linear
    assert "the two do not compare" in linear
    only = _result("imagenet", task="linear").markdown()
    assert "| published |" not in only


def test_the_table_for_a_terminal_says_the_same() -> None:
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(_result("cifar10", "pets").table("mine [x]"))
    text = console.export_text()
    for words in ("paper11, zero-shot, %", "mine [x]", "measured", "45.0", "RWKV-CLIP", "published", "79.8", "gone"):
        assert words in text
