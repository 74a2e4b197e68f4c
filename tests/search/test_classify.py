"""Classification of images by class names and by examples: numbers, tables, heads in files, and wrong input."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

import declip
from conftest import SHAPES, draw, read_table, refuses, texture
from declip.data.images.decode import LazyJpeg
from declip.data.sources.header import warn_once
from declip.models.dual_encoder import DualEncoder
from declip.search.checks import read_classes

CLASSES = ["red circle", "blue bar", "green square"]


@pytest.fixture
def classify(command, weights_file, folder):
    """Runs the command on the folder of drawings."""
    return lambda *words: command("classify", weights_file, folder, "--quiet", *words)


@pytest.fixture
def refused(command, weights_file, folder):
    return lambda parts, *words: command.refused(
        parts, "classify", weights_file, folder, "--quiet", *words
    )


def test_probabilities_are_those_of_clip(model, folder):
    (folder / "broken.png").write_bytes(b"no image")
    result = declip.classify(model, folder, CLASSES, templates=["{}", "a {}"], batch_size=7)
    assert (len(result.predictions), sum(result.counts.values())) == (24, 24)
    assert result.skipped.counts == {"unreadable image": 1}
    with torch.no_grad():
        texts = [model.encode_text(model.tokenize([name, f"a {name}"])) for name in CLASSES]
        classes = normalize(torch.stack([two.mean(0) for two in texts]), dim=1)
        for prediction in result.predictions[::5]:
            image = model.encode_image(model.preprocess([Image.open(folder / prediction.image)]))[0]
            expected = (model.logit_scale.exp() * classes @ image).double().softmax(0)
            given = torch.tensor(list(prediction.probabilities.values()), dtype=torch.float64)
            assert (given - expected).abs().max() < 1e-6
            assert prediction.probabilities[prediction.best] == prediction.probability == max(given)
            assert list(prediction.probabilities) == CLASSES


def test_a_table_has_every_probability(model, folder, tmp_path, classify, refused):
    (folder / "sub").mkdir()
    for name in ("=1.png", "sub/red-bar.png"):
        draw("red", "bar").save(folder / name)
    (folder / "broken.png").write_bytes(b"no image")
    kept = declip.classify(model, folder, CLASSES).predictions
    (tmp_path / "classes.txt").write_text("red circle\nblue bar\n\ngreen  square\nblue bar\n")
    words = ["--classes", tmp_path / "classes.txt", "--precision", "fp32", "--out"]
    made = classify(*words, tmp_path / "x.csv")
    assert (made.status, "26 images" in made.out, "unreadable image" in made.out) == (0, True, True)
    rows = read_table(tmp_path / "x.csv")
    assert [row["image"].lstrip("'") for row in rows] == [one.image for one in kept]
    assert [row["class"] for row in rows] == [one.best for one in kept]
    assert float(rows[3]["blue bar"]) == pytest.approx(kept[3].probabilities["blue bar"], rel=1e-5)
    assert rows[0]["image"] == "'=1.png", "a spreadsheet computes nothing"
    for wrong in ("x.tsv", "sorted"):
        refused([".csv"], *words, tmp_path / wrong)
        assert not (tmp_path / wrong).exists()
    declip.classify(model, folder, ["=1+1", "b"], out=tmp_path / "x.csv", overwrite=True)
    rows = read_table(tmp_path / "x.csv")
    assert all(row[row["class"]] == row["probability"] for row in rows)


def test_a_file_a_pattern_and_images_in_memory(model, folder, tmp_path, weights_file, command):
    one = folder / "red-bar.png"
    printed = command("classify", weights_file, one, "--classes", "red circle,blue bar", "--quiet")
    assert (printed.out.split("\t")[0], printed.out.count("\n")) == (str(one), 1)
    found = declip.classify(model, folder / "red-*.png", CLASSES).predictions
    names = [Path(row.image).name for row in found]
    assert names == sorted(path.name for path in folder.glob("red-*"))
    items = [Image.open(one), one.read_bytes(), "gone.png"]
    result = declip.classify(model, items, CLASSES, out=tmp_path / "x.csv")
    assert (sum(result.counts.values()), result.predictions) == (2, [])
    assert result.skipped.counts == {"missing image": 1}


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
    root = tmp_path / "examples"
    for color in COLORS:
        things = root / f"{color}_thing"
        things.mkdir(parents=True)
        for size, shape in enumerate(SHAPES):
            draw(color, shape).resize((40 + size, 40)).save(things / f"{shape}.png")
    (root / "red_thing" / "broken.png").write_bytes(b"no image")
    return root


def test_examples_teach_a_model_that_knows_nothing(model, folder, examples):
    result = declip.classify(model, folder, examples=examples)
    for one in (one for one in result.predictions if one.image.startswith(COLORS)):
        assert one.best == f"{one.image.split('-')[0]} thing"
        assert sum(one.probabilities.values()) == pytest.approx(1)
    classifier = result.classifier
    assert classifier.classes == tuple(sorted(f"{c} thing" for c in COLORS))
    assert sum(classifier.counts) == 3 * len(SHAPES)
    assert classifier.skipped.counts == {"unreadable image": 1}
    words = ("with 3 examples per class", "n = 12", "unreadable")
    assert [word for word in words if word not in classifier.summary()] == []


def test_large_examples_are_decoded_as_small_as_images_that_are_classified(
    model, tmp_path, monkeypatch
):
    decode, scales = LazyJpeg.pixels, []

    def pixels(self, scale=1):
        scales.append(scale)
        return decode(self, scale)

    monkeypatch.setattr(LazyJpeg, "pixels", pixels)
    for name in "ab":
        (tmp_path / name).mkdir()
        texture(0, side=900).save(tmp_path / name / "photo.jpg")
    declip.Classifier.fit(model, examples=tmp_path)
    assert scales == [8, 8]


def test_a_class_may_be_a_name_alone(model, folder, examples):
    classes = ["blue_thing", "red thing", "green thing", "a star"]
    fitted = declip.Classifier.fit(model, classes, examples)
    assert fitted.counts == (len(SHAPES), len(SHAPES), len(SHAPES), 0)
    assert fitted.head.name_weight > 0
    result = declip.classify(model, folder, head=fitted)
    assert "a star" in result.counts
    refuses("--classes", declip.Classifier.fit, model, ["red thing", "blue thing"], examples)


def test_classes_that_differ_only_in_case_are_refused(model, examples):
    (examples / "green_thing").rename(examples / "Red thing")
    for classes in (None, ["red thing", "blue_thing", "RED thing"]):
        refuses("differ only in case", declip.Classifier.fit, model, classes, examples)


def test_views_of_one_object_are_left_out_together(
    folder, tmp_path, weights_file, classify, refused, caplog
):
    warn_once.cache_clear()
    rows = ["image,kind,product,title,keywords"]
    for number in range(60):
        image = Image.blend(texture(number // 3), texture(100 + number), 0.2)
        image.save(tmp_path / f"{number}.png")
        rows.append(f"{number}.png,{'ab'[number // 3 % 2]},P{number // 3},x,y")
    (tmp_path / "views.csv").write_text("\n".join(rows))
    words = ["--examples", tmp_path / "views.csv", "--label-column", "kind"]
    first, second = classify(*words), classify(*words, "--group-column", "product")
    assert (first.status, second.status) == (0, 0), second.err
    hint = "--group-column product"
    assert (hint in first.err, hint in second.err) == (True, False)
    assert "Not used" not in caplog.text
    refused(["'produkt'"], *words, "--group-column", "produkt")
    columns = declip.Columns(group="x")
    fit = declip.Classifier.fit
    refuses("requires a table", fit, weights_file, None, folder, columns=columns)


@pytest.fixture
def products(tmp_path):
    """A folder of class folders with a table, as Hugging Face writes it: three views of each of 12 objects."""
    rows, root = ["Bild,label,product"], tmp_path / "products"
    for kind in "ab":
        (root / kind).mkdir(parents=True)
    for number in range(36):
        product = number // 3
        name = f"{'ab'[product % 2]}/{number}.png"
        Image.blend(texture(product), texture(100 + number), 0.2).save(root / name)
        rows.append(f"{name},{name[0]},P{product}")
    table = root / "metadata.csv"
    table.write_text("\n".join(rows))
    return table


def test_a_column_that_is_named_is_that_of_the_folders_table(products, classify, refused):
    root = products.parent
    products.write_text(products.read_text().replace("Bild", "file_name"))
    assert "n = 36," in classify("--examples", root).err
    for given in (root, products):
        assert "n = 12," in classify("--examples", given, "--group-column", "product").err
    refused(["'nonsense'"], "--examples", root, "--group-column", "nonsense")
    printed = classify("--examples", root, "--label-column", "product").err
    assert printed.startswith("36 examples of 12 classes")


def test_a_table_that_is_no_csv_file_is_refused_before_the_model_is_read(folder):
    refuses(("x.txt", ".csv", "--out"), declip.classify, "no model", folder, CLASSES, out="x.txt")


def test_columns_of_images_are_also_those_of_the_examples(products, classify, refused):
    products.write_text(products.read_text().replace("label", "art"))
    image, label = ["--image-column", "Bild"], ["--label-column", "art"]
    for missing, given in ((label, image), (image, label)):
        wrong = refused(missing[:1], "--examples", products, *given)
        assert "caption" not in wrong.err
    right = classify("--examples", products, *image, *label, "--group-column", "product")
    assert (right.status, "n = 12," in right.err) == (0, True)


def test_a_caption_that_is_named_is_not_read_where_classes_are_used(products, weights_file):
    columns = declip.Columns(image="Bild", caption="missing")
    assert sum(declip.Classifier.fit(weights_file, None, products, columns=columns).counts) == 36
    options = {"label_column": "label", "columns": columns, "device": "cpu"}
    assert declip.evaluate(weights_file, products, **options).n == 36


def test_objects_of_which_there_is_one_for_each_class_give_no_accuracy(products, classify):
    text = products.read_text().replace("Bild", "file_name")
    products.write_text(re.sub(r"(?m)^(.)(.*),P\d+$", r"\1\2,\1", text))
    printed = classify("--examples", products, "--group-column", "product").err
    assert ("No accuracy" in printed, "%" in printed) == (True, False)


def test_names_of_classes_cannot_control_a_terminal(tmp_path, classify):
    for name in ("a\x1b[31m", "b\x1b]0;t\x07"):
        (tmp_path / "odd" / name).mkdir(parents=True)
        for number in range(2):
            texture(number + len(name)).save(tmp_path / "odd" / name / f"{number}.png")
    examples, head = ["--examples", tmp_path / "odd"], tmp_path / "head.safetensors"
    for status, words in (
        (0, [*examples, "--save", head]),
        (0, ["--head", head]),
        (0, [*examples, "--out", tmp_path / "x.csv"]),
        (2, [*examples, "--classes", "x,y"]),
    ):
        printed = classify(*words)
        assert printed.status == status, words
        assert not {"\x1b", "\x07"} & {*printed.out, *printed.err}


def test_a_saved_head_gives_the_same(model, folder, examples, tmp_path, classify):
    rows = [f"{path},{path.parent.name}" for path in sorted(examples.rglob("*.png"))]
    table, head = tmp_path / "examples.csv", tmp_path / "head.safetensors"
    table.write_text("\n".join(["image,kind", *rows]))
    first = classify("--examples", table, "--label-column", "kind", "--save", head)
    again = classify("--head", head)
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
