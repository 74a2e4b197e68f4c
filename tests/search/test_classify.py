"""Classification of images by class names: the numbers, the tables, the folders, and wrong input."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

import declip
from conftest import draw, refuses
from declip.search.class_names import read_classes

CLASSES = ["red circle", "blue bar", "green square"]


def test_probabilities_are_those_of_clip(model, folder):
    (folder / "broken.png").write_bytes(b"no image")
    result = declip.classify(model, folder, CLASSES, templates=["{}", "a {}"], batch_size=7)
    assert (len(result.predictions), sum(result.counts.values())) == (24, 24)
    assert result.skipped.counts == {"unreadable image": 1}
    with torch.no_grad():
        texts = [[model.encode_text(model.tokenize([text]))[0] for text in (name, f"a {name}")] for name in CLASSES]
        classes = normalize(torch.stack([torch.stack(two).mean(0) for two in texts]), dim=1)
        for prediction in result.predictions[::5]:
            image = model.encode_image(model.preprocess([Image.open(folder / prediction.image)]))[0]
            expected = (model.logit_scale.exp() * classes @ image).double().softmax(0)
            given = torch.tensor(list(prediction.probabilities.values()), dtype=torch.float64)
            assert (given - expected).abs().max() < 1e-6
            assert prediction.probabilities[prediction.best] == prediction.probability == max(given)
            assert list(prediction.probabilities) == CLASSES


def test_a_table_has_every_probability(model, folder, tmp_path, weights_file, command):
    (folder / "sub").mkdir()
    for name in ("=1.png", "sub/red-bar.png"):
        draw("red", "bar").save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    kept = declip.classify(model, folder, CLASSES).predictions
    (tmp_path / "classes.txt").write_text("red circle\nblue bar\n\ngreen  square\nblue bar\n")
    words = ["classify", folder, "--classes", tmp_path / "classes.txt", "--model", weights_file, "--precision", "fp32"]
    words += ["--quiet", "--out"]
    made = command(*words, tmp_path / "x.csv")
    assert (made.status, "26 images" in made.out, "unreadable image" in made.out) == (0, True, True)
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [row["image"].lstrip("'") for row in rows] == [one.image for one in kept]
    assert [row["class"] for row in rows] == [one.best for one in kept]
    assert float(rows[3]["blue bar"]) == pytest.approx(kept[3].probabilities["blue bar"], rel=1e-5)
    assert rows[0]["image"] == "'=1.png", "a spreadsheet computes nothing"
    for wrong in ("x.tsv", "sorted"):
        refused = command(*words, tmp_path / wrong)
        assert (refused.status, ".csv" in refused.err, (tmp_path / wrong).exists()) == (2, True, False)
    declip.classify(model, folder, ["=1+1", "b"], out=tmp_path / "x.csv")
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert all(row[row["class"]] == row["probability"] for row in rows)


def test_a_file_a_pattern_and_images_in_memory(model, folder, tmp_path, weights_file, command):
    whole = {one.image: one.probabilities for one in declip.classify(model, folder, CLASSES).predictions}
    one = folder / "red-bar.png"
    printed = command("classify", one, "--classes", "red circle,blue bar", "--model", weights_file, "--quiet")
    assert (printed.out.split("\t")[0], printed.out.count("\n")) == (str(one), 1)
    found = declip.classify(model, folder / "red-*.png", CLASSES).predictions
    assert [Path(row.image).name for row in found] == sorted(name for name in whole if name.startswith("red-"))
    items = [Image.open(one), one.read_bytes(), "gone.png"]
    result = declip.classify(model, items, CLASSES, out=tmp_path / "x.csv")
    assert (sum(result.counts.values()), result.skipped.counts, result.predictions) == (2, {"missing image": 1}, [])
    assert "--model" in command("classify", one, "--classes", "a,b").err


def test_many_class_names_may_be_one_text():
    names = [f"class {number}" for number in range(99)]
    assert read_classes(",".join(names)) == names
    assert read_classes([1, 2]) == ["1", "2"]


def test_wrong_classes_and_images_are_named(model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("only\nonly\n")
    Path("latin.txt").write_bytes("Bär\nZoo".encode("latin-1"))
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"x")
    wrong = (
        (folder, "nowhere.txt", "nowhere.txt"),
        (folder, "cat,", "'cat'"),
        (folder, [], "two"),
        (folder, "one.txt", "'only'"),
        (folder, "latin.txt", "latin.txt"),
        ("broken", CLASSES, "None of the 1 images"),
        ("nowhere", CLASSES, "nowhere"),
    )
    for images, classes, says in wrong:
        refuses(says, declip.classify, model, images, classes, out="out.csv")
        assert not Path("out.csv").exists()
