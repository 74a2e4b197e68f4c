"""From a source to a typed result, a row of JSON and a table; the eleven sets and the published rows below them."""

import io
import json
from functools import partial

import pytest
import torch
from rich.console import Console
from torch import nn
from torchvision import datasets

from conftest import TINY, refuses
from declip.api import evaluate
from declip.evaluation.datasets import Dataset
from declip.evaluation.protocols import SETS, Options, evaluate_all, evaluate_suite
from declip.evaluation.results import Measure, read_result, short_names
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe
from declip.reports.page import rich_table
from declip.reports.tables import results_table
from evaluation import trees

NAMES = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")


def test_what_cannot_be_measured_is_said_before_anything_is_encoded(model, painted):
    first = Dataset("first", {"test": lambda: painted(["red"], classes=NAMES)})
    for task, classes, message in (
        ("zeroshot", NAMES, "'zeroshot'.*'zero-shot'.*retrieval"),
        ("zero-shot", None, "'painted' has no classes.*retrieval"),
        ("zero-shot", ("red",), "at least two classes"),
    ):
        second = Dataset(
            "second", {"test": lambda classes=classes: painted(["red", "red"], classes=classes)}
        )
        refuses(message, evaluate_all, model, [first, second], (task,))
    assert model.passes == []


def test_tasks_share_the_images(model, painted):
    source = painted(["red", "green", "blue"], classes=NAMES, broken=[1])
    zero_shot, retrieval = evaluate_all(
        model, source, ("zero-shot", "retrieval"), Options(progress=False)
    )
    assert [kind for kind, *_ in model.passes].count("image") == 1
    assert (zero_shot.top1, zero_shot.top5, zero_shot.mean_per_class) == (1.0, 1.0, 1.0)
    assert zero_shot.n == 2
    assert (retrieval.text_to_image.r1, retrieval.image_to_text.r1) == (1.0, 1.0)
    assert retrieval.text_to_image.chance1 == pytest.approx(1 / 2)


@pytest.fixture
def probed(model):
    """The model with a backbone of its own: the mean color, three times as long."""
    model.encode_backbone = lambda pixels: 3 * model.encode_image(pixels)
    return model


@pytest.fixture
def dataset(painted):
    """A maker of sets: for each split the colors of its images."""

    def make(**splits):
        sources = {
            which: painted(colors, classes=NAMES, name=f"set/{which}")
            for which, colors in splits.items()
        }
        return Dataset(
            "set", {which: (lambda source=source: source) for which, source in sources.items()}
        )

    return make


def test_probes_of_a_model_that_knows_its_colors(probed, dataset):
    on = dataset(train=NAMES * 3, validation=NAMES * 2, test=("red", "blue", "white"))
    linear = evaluate(probed, on, "linear")
    assert sum(size for _, size, *_ in probed.passes) == 38  # each split once
    assert not any(training or grad for *_, training, grad in probed.passes)
    assert (linear.top1, linear.mean_per_class, linear.n, linear.classes) == (1.0, 1.0, 3, 7)
    assert (linear.dataset, linear.validation) == ("set", "validation split")
    assert (linear.train, linear.width) == (35, 3)
    names = [measure.name for measure in linear.measures()]
    assert names == ["linear probe, top-1", "linear probe, mean per class"]
    _assert_read_back(linear)


def test_a_real_model_can_be_probed_and_its_truncated_captions_are_counted(painted, dataset):
    torch.manual_seed(0)
    real = DualEncoder(Recipe.model_validate(TINY))
    result = evaluate(real, dataset(train=(*NAMES, *NAMES, *NAMES[:5]), test=NAMES), "linear")
    assert (result.width, result.validation, result.train) == (64, "fifth of train", 19)
    assert result.top1 > 0.5  # even random weights tell colors apart
    source = painted(["red", "blue"], captions=[("red " * 50, "red"), ("a blue thing",)])
    assert evaluate(real, source, "retrieval").truncated_captions == 1


def test_unreadable_images_are_counted_over_all_splits(probed, painted):
    train = painted(NAMES * 3, classes=NAMES, broken=[19, 20])
    test = painted(NAMES, classes=NAMES, broken=[0])
    on = Dataset("set", {"train": lambda: train, "test": lambda: test}, metric="mean_per_class")
    result = evaluate(probed, on, "linear")
    assert result.mean_per_class == 1.0  # labels follow the images that could be read
    assert result.skipped == {"truncated image": 3}
    assert (result.train, result.n) == (19, 6)


def test_sets_that_cannot_be_probed(probed, painted, dataset):
    bare, on = painted(NAMES, classes=NAMES), dataset(train=NAMES, test=NAMES)
    without = "'painted' has no train split.*'zero-shot' or 'retrieval'"
    refuses(without, evaluate, probed, bare, "linear")
    refuses("fewer than two training images for 7 of its 7 classes", evaluate, probed, on, "linear")
    assert probed.passes == []


def test_splits_that_do_not_fit_each_other(probed, painted):
    train, other = painted(NAMES * 2, classes=NAMES), painted(NAMES, classes=NAMES[::-1])
    on = Dataset("set", {"train": lambda: train, "test": lambda: other})
    refuses("splits of 'set' .*7 class names.*same order", evaluate, probed, on, "linear")
    train.columns["label"][3] = 7
    refuses("from 0 to 7", evaluate, probed, on, "linear")


def _assert_read_back(result):
    row = json.loads(json.dumps({"step": 7} | result.to_dict()))
    assert row["task"] == result.task
    assert row.get("chance") == (None if result.task == "retrieval" else 1 / 7)
    assert read_result(row) == result


def test_the_table_has_every_number_with_its_chance_and_majority(model, painted):
    source = painted(["red", "green", "red", "white"], classes=NAMES, broken=[3])
    results = evaluate_all(model, source, ("zero-shot", "retrieval"))
    for result in results:
        _assert_read_back(result)
    assert results[1].to_dict()["text_to_image_r1"] == results[1].text_to_image.r1
    assert read_result({"task": "séance"}) is read_result({}) is None
    assert str(results[0]).startswith("painted\n  top-1 100.0 % (chance 14.3 %, n = 3)\n")
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(rich_table(results_table(results)))
    text = console.export_text()
    chance = "14.3 % (largest class 66.7 %)"
    for words in ("painted", "top-1", "100.0 %", chance, " 7  ", "text → image R@1"):
        assert words in text
    assert "truncated image" in text
    even = evaluate(model, painted(NAMES, classes=NAMES))
    assert [measure.majority for measure in even.measures()] == [None] * 3


def test_the_interval_of_a_share():
    # 30 of 100: Wilson's 95 % interval is 0.2189 to 0.3958.
    assert Measure("top-1", 0.3, 0.01, 100).interval == pytest.approx((0.2189, 0.3958), abs=1e-4)


def test_short_names_keep_what_tells_sets_apart():
    short = {
        "/d/coco/test.jsonl": "/d/coco/test.jsonl", "/d/flickr/test.jsonl": "/d/flickr/test.jsonl",
        "own/mine.csv": "mine.csv", "coco:/d/2014": "coco:2014", "C:\\data\\a.csv": "a.csv", "/d/photos/": "photos",
        "builtin:stamps": "builtin:stamps",
    }  # fmt: skip
    assert short_names(short) == short


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
    _, found = evaluate_suite(NameModel(), f"paper11:{root}", "zero-shot", Options(progress=False))
    row = json.loads(json.dumps(found))
    # Of the pets 3 of 3, 0 of 1 and 2 of 2 are right.
    pets = row["results"]["pets"]
    assert (pets["templates"], pets["top1"]) == ("pets", pytest.approx(5 / 6))
    assert (pets["metric"], pets["n"]) == ("mean_per_class", 6)
    assert set(row["missing"]) == set(SETS) - set(row["results"])
    assert "food-101/" in row["missing"]["food101"]
    assert str(root / "cars") in row["missing"]["cars"]
    assert list(row["values"]) == ["cifar10", "pets", "dtd"]
    assert row["values"] == {"cifar10": 1.0, "pets": pytest.approx(2 / 3), "dtd": 1.0}
    assert row["average"] == pytest.approx((1 + 2 / 3 + 1) / 3)


def test_what_is_not_a_suite_or_not_there():
    suite = partial(evaluate_suite, NameModel())
    refuses("'retrieval'.*linear, zero-shot", suite, "paper11:/x", "retrieval")
    refuses("paper11.*'/nowhere/cifar10'", suite, "paper11:/nowhere")


def test_the_linear_probe_learns_on_train(root):
    _, found = evaluate_suite(NameModel(), f"paper11:{root}", "linear", Options(progress=False))
    assert found["values"] == {"cifar10": 1.0}
    assert "too few" in found["missing"]["pets"]
