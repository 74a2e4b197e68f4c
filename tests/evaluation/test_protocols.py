"""`evaluate`, from a source to a typed result, a row of JSON and a table."""

import io
import json

import pytest
import torch
from rich.console import Console

from conftest import TINY
from declip.errors import UserError
from declip.evaluation.datasets import Dataset
from declip.evaluation.probes.results import FewShotResult, KNNResult, LinearProbeResult
from declip.evaluation.protocols import PROTOCOLS, Options, evaluate, evaluate_all
from declip.evaluation.results import (
    Measure,
    RetrievalResult,
    ZeroShotResult,
    read_result,
    results_table,
    short_names,
)
from declip.io.text import percent, times
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
    assert (result.on, result.templates) == ("painted", "plain")


def test_labels_follow_the_images_that_could_be_read(model, painted) -> None:
    source = painted(["red", "blue", "cyan"], classes=NAMES, broken=[0])
    source.labels[1] = NAMES.index("green")
    assert evaluate(model, source).top1 == 0.5


def test_the_templates_of_the_emoji_source(model, painted) -> None:
    source = painted(["red", "blue"], classes=NAMES, name="builtin:emoji/test")
    assert evaluate(model, source).templates == "emoji"
    assert evaluate(model, source, templates="plain").templates == "plain"
    assert evaluate(model, source, templates="a {}").templates == "a {}"


def test_retrieval_needs_no_classes(model, painted) -> None:
    result = evaluate(model, painted(["red", "green", "blue"]), "retrieval")
    assert isinstance(result, RetrievalResult)
    assert (result.text_to_image.r1, result.image_to_text.r1) == (1.0, 1.0)
    assert result.text_to_image.chance1 == pytest.approx(1 / 3)


def test_both_protocols_encode_the_images_once(model, painted) -> None:
    source = painted(["red", "green"], classes=NAMES)
    results = evaluate_all(model, source, ("zero-shot", "retrieval"), Options(progress=False))
    assert [result.protocol for result in results] == ["zero-shot", "retrieval"]
    assert [kind for kind, *_ in model.passes].count("image") == 1


@pytest.mark.parametrize(
    ("protocol", "classes", "message"),
    [
        ("zeroshot", NAMES, "Unknown protocol 'zeroshot'.*Did you mean 'zero-shot'.*retrieval"),
        ("zero-shot", None, "'painted' has no classes.*`labels`.*`class_names`.*retrieval"),
        ("zero-shot", ("red",), "at least two classes"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_encoded(model, painted, protocol, classes, message) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(model, painted(["red", "red"], classes=classes), protocol)
    assert model.passes == []


def test_an_empty_source(model, painted) -> None:
    with pytest.raises(UserError, match="'painted' holds no pair"):
        evaluate(model, painted([]), "retrieval")


def test_a_source_is_opened_by_its_name(model, tmp_path, painted) -> None:
    pair = painted(["red"])[0]
    for name in ("red", "blue"):
        pair.image.save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"{name}\n")
    result = evaluate(model, str(tmp_path), "retrieval")
    assert isinstance(result, RetrievalResult)
    assert (result.images, result.texts) == (2, 2)
    with pytest.raises(UserError, match="no file or folder"):
        evaluate(model, str(tmp_path / "nowhere"))


def test_rows_of_json_are_read_back(model, painted) -> None:
    source = painted(["red", "green", "blue"], classes=NAMES, broken=[1])
    for result in evaluate_all(model, source, ("zero-shot", "retrieval")):
        row = json.loads(json.dumps({"step": 7} | result.to_dict()))
        assert read_result(row) == result
    assert read_result({"protocol": "guessing", "top1": 0.5}) is None


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
    linear, knn, few = evaluate_all(probed, on, ("linear", "knn", "few-shot"), Options(shots=(1, 2), seeds=2))
    assert isinstance(linear, LinearProbeResult)
    assert (linear.top1, linear.mean_per_class, linear.n, linear.classes) == (1.0, 1.0, 3, 7)
    assert (linear.on, linear.train, linear.width, linear.features) == ("set", 35, 3, "backbone")
    assert linear.validation == "validation split"
    assert isinstance(knn, KNNResult)
    assert [vote.k for vote in knn.votes] == [1, 10, 20, 35]
    assert knn.votes[0].top1 == 1.0
    assert isinstance(few, FewShotResult)
    assert [(run.shots, run.mean, len(run.scores)) for run in few.runs] == [(1, 1.0, 2), (2, 1.0, 2)]


def test_several_probes_encode_each_split_once(probed, dataset) -> None:
    on = dataset(train=NAMES * 3, test=("red", "blue"))
    evaluate_all(probed, on, ("linear", "knn", "few-shot"), Options(cache=False, shots=(1,)))
    assert sum(size for _, size, *_ in probed.passes) == 23
    assert not any(training or grad for *_, training, grad in probed.passes)


def test_a_fifth_of_train_takes_the_place_of_validation(probed, dataset) -> None:
    result = evaluate(probed, dataset(train=NAMES * 5, test=NAMES), "linear")
    assert (result.validation, result.train) == ("fifth of train", 35)
    assert evaluate(probed, dataset(train=NAMES * 5, test=NAMES), "linear") == result


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
    assert result.width == 64
    assert result.top1 > 0.5  # even random weights tell colors apart


def test_unreadable_images_are_counted_over_all_splits(probed, painted) -> None:
    train = painted(NAMES * 3, classes=NAMES, broken=[19, 20])
    test = painted(NAMES, classes=NAMES, broken=[0])
    result = evaluate(probed, Dataset("set", {"train": lambda: train, "test": lambda: test}), "knn")
    assert result.votes[0].top1 == 1.0  # labels follow the images that could be read
    assert result.skipped == {"truncated image": 3}
    assert (result.train, result.n) == (19, 6)


@pytest.mark.parametrize("protocol", ["linear", "knn", "few-shot"])
def test_a_set_without_training_images(probed, painted, protocol) -> None:
    with pytest.raises(UserError, match=r"'painted' has no train split.*measured by: zero-shot, retrieval"):
        evaluate(probed, painted(NAMES, classes=NAMES), protocol)
    with pytest.raises(UserError, match=r"measured by: retrieval\."):
        evaluate(probed, painted(NAMES), protocol)
    assert probed.passes == []


@pytest.mark.parametrize("protocol", ["linear", "few-shot"])
def test_one_image_a_class_is_too_few_to_choose_on(probed, dataset, protocol) -> None:
    on = dataset(train=NAMES, test=NAMES)
    with pytest.raises(UserError, match=r"7 training images for 7 classes.*fewer than two for 7.*by: knn, zero-shot"):
        evaluate(probed, on, protocol)
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


def test_the_metric_of_the_set_is_the_results(probed, painted) -> None:
    source = painted(NAMES * 3, classes=NAMES)
    on = Dataset("set", {"train": lambda: source, "test": lambda: source}, metric="mean_per_class")
    assert evaluate(probed, on, "knn").metric == "mean_per_class"


def test_the_protocols() -> None:
    assert set(PROTOCOLS) == {"zero-shot", "retrieval", "linear", "knn", "few-shot"}


def test_the_table_has_every_number_with_its_chance(model, painted) -> None:
    source = painted(["red", "green", "blue", "white"], classes=NAMES, broken=[3])
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(results_table(evaluate_all(model, source, ("zero-shot", "retrieval")), title="Measured"))
    text = console.export_text()
    for words in ("Measured", "painted", "top-1", "100.0 %", "14.3 %", "7.0", "text → image R@1", "33.3 %"):
        assert words in text
    assert "1 truncated image" in text


def test_the_interval_of_a_share() -> None:
    # 30 of 100: Wilson's 95 % interval is 0.2189 to 0.3958.
    assert Measure("top-1", 0.3, 0.01, 100).margin == pytest.approx((0.3958 - 0.2189) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("share", "text"), [(0.367, "36.7 %"), (1 / 1285, "0.078 %"), (0.0032, "0.32 %"), (0.0, "0.00 %")]
)
def test_percent(share: float, text: str) -> None:
    assert percent(share) == text


@pytest.mark.parametrize(("factor", "text"), [(1.44, "1.4"), (36.6, "37"), (1285.0, "1,285")])
def test_times(factor: float, text: str) -> None:
    assert times(factor) == text


def test_short_names_keep_what_tells_sets_apart() -> None:
    names = [
        "/d/coco/test.jsonl",
        "/d/flickr/test.jsonl",
        "test.jsonl",
        "own/mine.csv",
        "coco:/d/2014",
        "builtin:stamps",
    ]
    short = ["coco/test.jsonl", "flickr/test.jsonl", "test.jsonl", "mine.csv", "coco:2014", "builtin:stamps"]
    assert list(short_names(names).values()) == short
