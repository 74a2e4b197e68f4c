"""`evaluate`, from a source to a typed result, a row of JSON and a table."""

import io
import json

import pytest
from rich.console import Console

from declip.errors import UserError
from declip.evaluation.protocols import Options, evaluate, evaluate_all
from declip.evaluation.results import (
    Measure,
    RetrievalResult,
    ZeroShotResult,
    percent,
    read_result,
    results_table,
    times,
)

NAMES = ("red", "green", "blue", "yellow", "cyan", "magenta", "white")


def test_zero_shot_of_a_model_that_knows_its_colours(model, painted) -> None:
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
    assert read_result({"protocol": "linear", "top1": 0.5}) is None


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
