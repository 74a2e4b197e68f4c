"""`evaluate`, from a source to a typed result, a row of JSON and a table."""

import io
import json

import pytest
import torch
from rich.console import Console

from conftest import TINY
from declip.errors import UserError
from declip.evaluation.datasets import Dataset
from declip.evaluation.protocols import Options, evaluate, evaluate_all
from declip.evaluation.results import (
    FewShotResult,
    KNNResult,
    LinearProbeResult,
    Measure,
    RetrievalResult,
    ZeroShotResult,
    read_result,
    results_table,
    short_names,
)
from declip.models.dual_encoder import DualEncoder
from declip.recipe.schema import Recipe

NAMES = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")


def test_zero_shot_of_a_model_that_knows_its_colors(model, painted) -> None:
    source = painted(["red", "blue", "cyan", "white"], classes=NAMES, broken=[1])
    result = evaluate(model, source)
    assert isinstance(result, ZeroShotResult)
    assert (result.top1, result.top5, result.mean_per_class) == (1.0, 1.0, 1.0)
    assert (result.n, result.classes, result.times_chance) == (3, 7, 7.0)
    assert result.skipped == {"truncated image": 1}
    assert (result.dataset, result.templates) == ("painted", "plain")


def test_labels_follow_the_images_that_could_be_read_and_templates_the_source(model, painted) -> None:
    source = painted(["red", "blue", "cyan"], classes=NAMES, broken=[0], name="builtin:emoji/test")
    source.labels[1] = NAMES.index("green")
    result = evaluate(model, source)
    assert (result.top1, result.templates) == (0.5, "emoji")
    assert evaluate(model, source, templates="plain").templates == "plain"
    assert evaluate(model, source, templates="a {}").templates == "a {}"


def test_retrieval_needs_no_classes(model, painted) -> None:
    result = evaluate(model, painted(["red", "green", "blue"]), "retrieval")
    assert isinstance(result, RetrievalResult)
    assert (result.text_to_image.r1, result.image_to_text.r1) == (1.0, 1.0)
    assert result.text_to_image.chance1 == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("task", "classes", "message"),
    [
        ("zeroshot", NAMES, "Unknown task 'zeroshot'.*Did you mean 'zero-shot'.*retrieval"),
        ("zero-shot", None, "'painted' has no classes.*`labels`.*`class_names`.*retrieval"),
        ("zero-shot", ("red",), "at least two classes"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_encoded(model, painted, task, classes, message) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(model, painted(["red", "red"], classes=classes), task)
    assert model.passes == []


def test_a_source_is_opened_by_its_name(model, tmp_path, painted) -> None:
    pair = painted(["red"])[0]
    for name in ("red", "blue"):
        pair.image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    result = evaluate(model, str(tmp_path), "retrieval")
    assert isinstance(result, RetrievalResult)
    assert (result.images, result.texts) == (2, 2)


def test_tasks_share_the_images_and_their_rows_of_json_are_read_back(model, painted) -> None:
    source = painted(["red", "green", "blue"], classes=NAMES, broken=[1])
    results = evaluate_all(model, source, ("zero-shot", "retrieval"), Options(progress=False))
    assert [kind for kind, *_ in model.passes].count("image") == 1
    assert [result.task for result in results] == ["zero-shot", "retrieval"]
    for result in results:
        row = json.loads(json.dumps({"step": 7} | result.to_dict()))
        assert read_result(row) == result


@pytest.fixture
def probed(model):
    """The model with a backbone of its own: the mean color, three times as long."""
    model.encode_backbone = lambda pixels: 3 * model.encode_image(pixels)
    return model


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path))


@pytest.fixture
def dataset(painted):
    """A maker of sets: for each split the colors of its images."""

    def make(**splits):
        sources = {which: painted(colors, classes=NAMES, name=f"set/{which}") for which, colors in splits.items()}
        return Dataset("set", {which: (lambda source=source: source) for which, source in sources.items()})

    return make


def test_probes_of_a_model_that_knows_its_colors(probed, dataset) -> None:
    on = dataset(train=NAMES * 3, validation=NAMES * 2, test=("red", "blue", "white"))
    options = Options(cache=False, shots=(2,), seeds=2)
    linear, knn, few = evaluate_all(probed, on, ("linear", "knn", "few-shot"), options)
    assert sum(size for _, size, *_ in probed.passes) == 38  # each split once
    assert not any(training or grad for *_, training, grad in probed.passes)
    assert isinstance(linear, LinearProbeResult)
    assert (linear.top1, linear.mean_per_class, linear.n, linear.classes) == (1.0, 1.0, 3, 7)
    assert (linear.dataset, linear.train, linear.width, linear.features) == ("set", 35, 3, "backbone")
    assert linear.validation == "validation split"
    assert isinstance(knn, KNNResult)
    assert [vote.k for vote in knn.votes] == [1, 10, 20, 35]
    assert knn.votes[0].top1 == 1.0
    assert isinstance(few, FewShotResult)
    assert [(run.shots, run.mean, len(run.scores)) for run in few.runs] == [(2, 1.0, 2)]


def test_features_after_the_projection(model, dataset) -> None:
    on = dataset(train=NAMES * 3, test=NAMES)
    assert evaluate(model, on, "knn", features="embedding").features == "embedding"
    with pytest.raises(UserError, match="no `encode_backbone`"):
        evaluate(model, on, "knn")


def test_the_cache_is_read_and_can_be_switched_off(probed, dataset, tmp_path) -> None:
    on = dataset(train=NAMES * 10, test=NAMES)
    evaluate(probed, on, "knn", cache=False)
    assert not (tmp_path / "features").exists()
    first = evaluate(probed, on, "knn")
    assert len(list((tmp_path / "features").iterdir())) == 2
    probed.passes.clear()
    assert evaluate(probed, on, "knn") == first
    assert sum(size for _, size, *_ in probed.passes) == 8  # four of each split, to compare


def test_a_real_model_can_be_probed(painted, dataset) -> None:
    torch.manual_seed(0)
    real = DualEncoder.from_recipe(Recipe.model_validate(TINY))
    result = evaluate(real, dataset(train=NAMES * 3, test=NAMES), "linear")
    assert (result.width, result.validation, result.train) == (64, "fifth of train", 21)
    assert result.top1 > 0.5  # even random weights tell colors apart


def test_unreadable_images_are_counted_over_all_splits(probed, painted) -> None:
    train = painted(NAMES * 3, classes=NAMES, broken=[19, 20])
    test = painted(NAMES, classes=NAMES, broken=[0])
    on = Dataset("set", {"train": lambda: train, "test": lambda: test}, metric="mean_per_class")
    result = evaluate(probed, on, "knn")
    assert result.metric == "mean_per_class"
    assert result.votes[0].top1 == 1.0  # labels follow the images that could be read
    assert result.skipped == {"truncated image": 3}
    assert (result.train, result.n) == (19, 6)


@pytest.mark.parametrize("task", ["linear", "knn", "few-shot"])
def test_a_set_without_training_images(probed, painted, task) -> None:
    with pytest.raises(UserError, match=r"'painted' has no train split.*measured by: zero-shot, retrieval"):
        evaluate(probed, painted(NAMES, classes=NAMES), task)
    with pytest.raises(UserError, match=r"measured by: retrieval\."):
        evaluate(probed, painted(NAMES), task)
    assert probed.passes == []


@pytest.mark.parametrize("task", ["linear", "few-shot"])
def test_one_image_a_class_is_too_few_to_choose_on(probed, dataset, task) -> None:
    on = dataset(train=NAMES, test=NAMES)
    with pytest.raises(UserError, match=r"7 training images for 7 classes.*fewer than two for 7.*by: knn, zero-shot"):
        evaluate(probed, on, task)
    assert probed.passes == []
    assert evaluate(probed, on, "knn").votes[0].top1 == 1.0


def test_a_few_classes_with_one_image_are_let_pass(probed, dataset) -> None:
    result = evaluate(probed, dataset(train=(*NAMES, *NAMES[:5]), test=NAMES), "linear")
    assert result.top1 == 1.0


def test_splits_that_do_not_fit_each_other(probed, painted) -> None:
    train, test = painted(NAMES * 2, classes=NAMES), painted(NAMES, classes=NAMES[::-1])
    with pytest.raises(UserError, match=r"train split of 'set' has 7 class names.*same order"):
        evaluate(probed, Dataset("set", {"train": lambda: train, "test": lambda: test}), "knn")
    test = painted(NAMES, classes=NAMES)
    train.labels[3] = 7
    with pytest.raises(UserError, match="labels from 0 to 7, but its 7 class names are numbered from 0"):
        evaluate(probed, Dataset("set", {"train": lambda: train, "test": lambda: test}), "knn")


def _printed(results, title: str | None = None) -> str:
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(results_table(results, title))
    return console.export_text()


def test_the_table_has_every_number_with_its_chance(model, painted) -> None:
    source = painted(["red", "green", "blue", "white"], classes=NAMES, broken=[3])
    text = _printed(evaluate_all(model, source, ("zero-shot", "retrieval")), "Measured")
    for words in ("Measured", "painted", "top-1", "100.0 %", "14.3 %", "7.0", "text → image R@1", "33.3 %"):
        assert words in text
    assert "1 truncated image" in text


def test_the_interval_of_a_share() -> None:
    # 30 of 100: Wilson's 95 % interval is 0.2189 to 0.3958.
    assert Measure("top-1", 0.3, 0.01, 100).margin == pytest.approx((0.3958 - 0.2189) / 2, abs=1e-4)


def test_the_majority_of_an_unbalanced_set_stands_next_to_chance(model, painted) -> None:
    result = evaluate(model, painted(["red"] * 3 + ["blue"], classes=NAMES))
    assert result.majority == 0.75
    assert read_result(json.loads(json.dumps(result.to_dict()))) == result
    assert "majority" in (text := _printed([result]))
    assert "75.0 %" in text
    even = evaluate(model, painted(NAMES, classes=NAMES))
    assert [measure.majority for measure in even.measures()] == [None] * 3


def test_truncated_captions_are_counted_and_said_once(painted, caplog) -> None:
    real = DualEncoder.from_recipe(Recipe.model_validate(TINY))
    source = painted(["red", "blue"], captions=[("red " * 50, "red"), ("a blue thing",)], name="long captions")
    results = [evaluate(real, source, "retrieval") for _ in range(2)]
    assert [result.truncated_captions for result in results] == [1, 1]
    said = [record.message for record in caplog.records if "long captions" in record.message]
    assert [message[:19] for message in said] == ["1 of the 3 captions"]


def test_short_names_keep_what_tells_sets_apart() -> None:
    short = {
        "/d/coco/test.jsonl": "coco/test.jsonl", "/d/flickr/test.jsonl": "flickr/test.jsonl",
        "test.jsonl": "test.jsonl", "own/mine.csv": "mine.csv", "coco:/d/2014": "coco:2014",
        "builtin:stamps": "builtin:stamps",
    }  # fmt: skip
    assert short_names(short) == short
