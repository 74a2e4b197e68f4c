"""Classification of images by class names and by examples: numbers, tables, heads in files, and wrong input."""

import csv
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

import declip
from conftest import SHAPES, draw, refuses, texture
from declip.data.images.decode import LazyJpeg
from declip.data.sources.header import warn_once
from declip.models.dual_encoder import DualEncoder
from declip.search.checks import read_classes

CLASSES = ["red circle", "blue bar", "green square"]


def test_probabilities_are_those_of_clip(model, folder):
    (folder / "broken.png").write_bytes(b"no image")
    result = declip.classify(model, folder, CLASSES, templates=["{}", "a {}"], batch_size=7)
    assert (len(result.predictions), sum(result.counts.values())) == (24, 24)
    assert result.skipped.counts == {"unreadable image": 1}
    with torch.no_grad():
        texts = [
            [model.encode_text(model.tokenize([text]))[0] for text in (name, f"a {name}")]
            for name in CLASSES
        ]
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
    words = [
        "classify",
        weights_file,
        folder,
        "--classes",
        tmp_path / "classes.txt",
        "--precision",
        "fp32",
    ]
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
        assert (refused.status, ".csv" in refused.err, (tmp_path / wrong).exists()) == (
            2,
            True,
            False,
        )
    declip.classify(model, folder, ["=1+1", "b"], out=tmp_path / "x.csv", overwrite=True)
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert all(row[row["class"]] == row["probability"] for row in rows)


def test_a_file_a_pattern_and_images_in_memory(model, folder, tmp_path, weights_file, command):
    whole = {
        one.image: one.probabilities for one in declip.classify(model, folder, CLASSES).predictions
    }
    one = folder / "red-bar.png"
    printed = command("classify", weights_file, one, "--classes", "red circle,blue bar", "--quiet")
    assert (printed.out.split("\t")[0], printed.out.count("\n")) == (str(one), 1)
    found = declip.classify(model, folder / "red-*.png", CLASSES).predictions
    assert [Path(row.image).name for row in found] == sorted(
        name for name in whole if name.startswith("red-")
    )
    items = [Image.open(one), one.read_bytes(), "gone.png"]
    result = declip.classify(model, items, CLASSES, out=tmp_path / "x.csv")
    assert (sum(result.counts.values()), result.skipped.counts, result.predictions) == (
        2,
        {"missing image": 1},
        [],
    )


def test_many_class_names_may_be_one_text():
    names = [f"class {number}" for number in range(99)]
    assert read_classes(",".join(names)) == names
    assert read_classes([1, 2]) == ["1", "2"]
    refuses("two classes or more, not 0", read_classes, "")


def test_wrong_classes_and_images_are_named(model, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("one.txt").write_text("only\nonly\n")
    Path("latin.txt").write_bytes("Bär\nZoo".encode("latin-1"))
    Path("broken").mkdir()
    Path("broken/a.png").write_bytes(b"x")
    wrong = (
        (folder, "nowhere.txt", "nowhere.txt"),
        (folder, [], "two"),
        (folder, "one.txt", "'only'"),
        (folder, "latin.txt", "latin.txt"),
        ("broken", CLASSES, "None of the 1 images"),
        ("nowhere", CLASSES, "nowhere"),
    )
    for images, classes, says in wrong:
        refuses(says, declip.classify, model, images, classes, out="out.csv")
        assert not Path("out.csv").exists()


COLORS = ("red", "blue", "green")


@pytest.fixture
def examples(tmp_path):
    """A folder of images for each of three colors, one of which cannot be read."""
    for color in COLORS:
        (tmp_path / "examples" / f"{color}_thing").mkdir(parents=True)
        for size, shape in enumerate(SHAPES):
            draw(color, shape).resize((40 + size, 40)).save(
                tmp_path / "examples" / f"{color}_thing" / f"{shape}.png"
            )
    (tmp_path / "examples" / "red_thing" / "broken.png").write_bytes(b"no image")
    return tmp_path / "examples"


def test_examples_teach_a_model_that_knows_nothing(model, folder, examples):
    result = declip.classify(model, folder, examples=examples)
    for one in (one for one in result.predictions if one.image.startswith(COLORS)):
        assert one.best == f"{one.image.split('-')[0]} thing"
        assert sum(one.probabilities.values()) == pytest.approx(1)
    classifier = result.classifier
    assert classifier.classes == tuple(sorted(f"{c} thing" for c in COLORS))
    assert (sum(classifier.counts), classifier.skipped.counts) == (
        3 * len(SHAPES),
        {"unreadable image": 1},
    )
    assert all(
        word in classifier.summary()
        for word in ("with 3 examples per class", "n = 12", "unreadable")
    )


def test_large_examples_are_decoded_as_small_as_images_that_are_classified(
    model, tmp_path, monkeypatch
):
    decode, scales = LazyJpeg.pixels, []
    monkeypatch.setattr(
        LazyJpeg, "pixels", lambda self, scale=1: scales.append(scale) or decode(self, scale)
    )
    for number in range(2):
        (tmp_path / f"{number}").mkdir()
        texture(number, side=900).save(tmp_path / f"{number}" / "photo.jpg")
    declip.Classifier.fit(model, examples=tmp_path)
    assert scales == [8, 8]


def test_a_class_may_be_a_name_alone(model, folder, examples):
    fitted = declip.Classifier.fit(
        model, ["blue_thing", "red thing", "green thing", "a star"], examples
    )
    assert fitted.counts == (len(SHAPES), len(SHAPES), len(SHAPES), 0)
    assert fitted.head.name_weight > 0
    result = declip.classify(model, folder, head=fitted)
    assert "a star" in result.counts
    refuses("--classes", declip.Classifier.fit, model, ["red thing", "blue thing"], examples)


def test_classes_that_differ_only_in_case_are_refused(model, examples):
    (examples / "green_thing").rename(examples / "Red thing")
    for classes in (None, ["red thing", "blue_thing", "RED thing"]):
        refuses("differ only in case", declip.Classifier.fit, model, classes, examples)


def test_views_of_one_object_are_left_out_together(folder, tmp_path, weights_file, command, caplog):
    warn_once.cache_clear()
    rows = ["image,kind,product,title,keywords"]
    for number in range(60):
        image = Image.blend(texture(number // 3), texture(100 + number), 0.2)
        image.save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'ab'[number // 3 % 2]},P{number // 3},x,y")
    (tmp_path / "views.csv").write_text("\n".join(rows))
    words = [
        "classify",
        weights_file,
        folder,
        "--examples",
        tmp_path / "views.csv",
        "--label-column",
        "kind",
    ]
    first, second = command(*words), command(*words, "--group-column", "product")
    assert (first.status, second.status) == (0, 0), second.err
    hint = "--group-column product"
    assert (hint in first.err, hint in second.err, "Not used" in caplog.text) == (
        True,
        False,
        False,
    )
    assert "'produkt'" in command(*words, "--group-column", "produkt").err
    refuses(
        "requires a table",
        declip.Classifier.fit,
        weights_file,
        None,
        folder,
        columns=declip.Columns(group="x"),
    )


@pytest.fixture
def products(tmp_path):
    """A folder of class folders with a table, as Hugging Face writes it: three views of each of 12 objects."""
    rows = ["Bild,label,product"]
    for number in range(36):
        name = f"{'ab'[number // 3 % 2]}/{number}.png"
        (tmp_path / "products" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.blend(texture(number // 3), texture(100 + number), 0.2).save(
            tmp_path / "products" / name
        )
        rows.append(f"{name},{name[0]},P{number // 3}")
    table = tmp_path / "products" / "metadata.csv"
    table.write_text("\n".join(rows))
    return table


def test_a_column_that_is_named_is_that_of_the_folders_table(
    folder, products, weights_file, command
):
    root = products.parent
    products.write_text(products.read_text().replace("Bild", "file_name"))
    words = ["classify", weights_file, folder, "--quiet", "--examples"]
    assert "n = 36," in command(*words, root).err
    for given in (root, products):
        assert "n = 12," in command(*words, given, "--group-column", "product").err
    wrong = command(*words, root, "--group-column", "nonsense")
    assert (wrong.status, "'nonsense'" in wrong.err) == (2, True)
    assert command(*words, root, "--label-column", "product").err.startswith(
        "36 examples of 12 classes"
    )


def test_a_table_that_is_no_csv_file_is_refused_before_the_model_is_read(folder):
    refuses(("x.txt", ".csv", "--out"), declip.classify, "no model", folder, CLASSES, out="x.txt")


def test_columns_of_images_are_also_those_of_the_examples(folder, products, weights_file, command):
    products.write_text(products.read_text().replace("label", "art"))
    words = ["classify", weights_file, folder, "--quiet", "--examples", products]
    wrong = command(*words, "--image-column", "Bild")
    assert (wrong.status, "--label-column" in wrong.err, "caption" in wrong.err) == (2, True, False)
    wrong = command(*words, "--label-column", "art")
    assert (wrong.status, "--image-column" in wrong.err, "caption" in wrong.err) == (2, True, False)
    right = command(
        *words, "--label-column", "art", "--image-column", "Bild", "--group-column", "product"
    )
    assert (right.status, "n = 12," in right.err) == (0, True)


def test_objects_of_which_there_is_one_for_each_class_give_no_accuracy(
    folder, products, weights_file, command
):
    rows = products.read_text().replace("Bild", "file_name").splitlines()
    products.write_text(
        "\n".join([rows[0], *(row.rpartition(",")[0] + f",{row[0]}" for row in rows[1:])])
    )
    words = [
        "classify",
        weights_file,
        folder,
        "--quiet",
        "--examples",
        products,
        "--group-column",
        "product",
    ]
    printed = command(*words).err
    assert ("No accuracy" in printed, "%" in printed) == (True, False)


def test_names_of_classes_cannot_control_a_terminal(model, folder, tmp_path, weights_file, command):
    for name in ("a\x1b[31m", "b\x1b]0;t\x07"):
        (tmp_path / "odd" / name).mkdir(parents=True)
        for number in range(2):
            texture(number + len(name)).save(tmp_path / "odd" / name / f"{number}.png")
    words = ["classify", weights_file, folder, "--quiet", "--examples", tmp_path / "odd"]
    head = tmp_path / "head.safetensors"
    printed = [
        command(*words, "--save", head),
        command("classify", weights_file, folder, "--head", head, "--quiet"),
    ]
    printed.append(command(*words, "--out", tmp_path / "x.csv"))
    printed.append(command(*words, "--classes", "x,y"))
    assert [each.status for each in printed] == [0, 0, 0, 2]
    assert not any(
        "\x1b" in each.out + each.err or "\x07" in each.out + each.err for each in printed
    )


def test_a_saved_head_gives_the_same(model, folder, examples, tmp_path, weights_file, command):
    rows = [f"{path},{path.parent.name}" for path in sorted(examples.rglob("*.png"))]
    table, head = tmp_path / "examples.csv", tmp_path / "head.safetensors"
    table.write_text("\n".join(["image,kind", *rows]))
    words = ["classify", weights_file, folder, "--quiet"]
    first = command(*words, "--examples", table, "--label-column", "kind", "--save", head)
    again = command(*words, "--head", head)
    assert (first.status, again.status, first.out) == (0, 0, again.out)
    assert ("Accuracy" in first.err, "Accuracy" in again.err) == (True, True)
    # --- another model, damaged files
    torch.manual_seed(5)
    other = DualEncoder(model.recipe).eval()
    refuses("another model", declip.classify, other, folder, head=head)
    stored = load_file(head)
    save_file(stored, tmp_path / "bare.safetensors")
    head.write_bytes(head.read_bytes()[:-8])
    for file in ("bare.safetensors", "head.safetensors", "gone.safetensors"):
        refuses(file, declip.classify, model, folder, head=tmp_path / file)
