"""Classification by examples: folders and tables, heads in files, "none of these", and wrong input."""

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import declip
from conftest import SHAPES, draw, refuses
from declip.models.dual_encoder import DualEncoder

COLORS = ("red", "blue", "green")


@pytest.fixture
def examples(tmp_path):
    """A folder of images for each of three colors, one of which cannot be read."""
    for color in COLORS:
        (tmp_path / "examples" / f"{color}_thing").mkdir(parents=True)
        for size, shape in enumerate(SHAPES):
            draw(color, shape).resize((40 + size, 40)).save(tmp_path / "examples" / f"{color}_thing" / f"{shape}.png")
    (tmp_path / "examples" / "red_thing" / "broken.png").write_bytes(b"no image")
    return tmp_path / "examples"


def test_examples_teach_a_model_that_knows_nothing(model, folder, examples):
    result = declip.classify(model, folder, examples=examples)
    right = [one for one in result.predictions if one.image.startswith(COLORS)]
    assert all(one.best == f"{one.image.split('-')[0]} thing" for one in right)
    assert all(sum(one.probabilities.values()) == pytest.approx(1) for one in right)
    classifier = result.classifier
    assert classifier is not None
    assert (classifier.classes, sum(classifier.counts)) == (
        tuple(sorted(f"{c} thing" for c in COLORS)),
        3 * len(SHAPES),
    )
    assert classifier.skipped.counts == {"unreadable image": 1}
    assert all(word in classifier.summary() for word in ("Accuracy", "n = ", "none of these", "unreadable"))


def test_a_class_may_be_a_name_alone(model, folder, examples):
    fitted = declip.Classifier.fit(model, ["blue_thing", "red thing", "green thing", "a star"], examples)
    assert fitted.counts == (len(SHAPES), len(SHAPES), len(SHAPES), 0)
    assert fitted.head.name_weight > 0
    result = declip.classify(model, folder, head=fitted)
    assert "a star" in result.counts
    refuses("--classes", declip.Classifier.fit, model, ["red thing", "blue thing"], examples)


def test_a_saved_head_gives_the_same(model, folder, examples, tmp_path, weights_file, command):
    rows = [f"{path},{path.parent.name}" for path in sorted(examples.rglob("*.png"))]
    table, head = tmp_path / "examples.csv", tmp_path / "head.safetensors"
    table.write_text("\n".join(["image,kind", *rows]))
    words = ["classify", folder, "--model", weights_file, "--quiet"]
    first = command(*words, "--examples", table, "--label-column", "kind", "--save", head)
    again = command(*words, "--head", head)
    assert (first.status, again.status, first.out) == (0, 0, again.out)
    assert ("Accuracy" in first.err, "Accuracy" in again.err) == (True, True)
    # --- another model, damaged files, options that cannot be combined
    torch.manual_seed(5)
    other = DualEncoder.from_recipe(model.recipe).eval()
    refuses("another model", declip.classify, other, folder, head=head)
    stored = load_file(head)
    save_file(stored, tmp_path / "bare.safetensors")
    head.write_bytes(head.read_bytes()[:-8])
    for file in ("bare.safetensors", "head.safetensors", "gone.safetensors"):
        refuses(file, declip.classify, model, folder, head=tmp_path / file)
    wrong = (["--head", head, "--classes", "a,b"], ["--classes", "a,b", "--reject"], ["--save", "x"], [])
    for options, name in zip(wrong, ("--classes", "--reject", "--save", "--classes"), strict=True):
        refused = command(*words, *options)
        assert (refused.status, name in refused.err) == (2, True)


def test_images_of_no_class_are_rejected(model, examples, tmp_path):
    result = declip.classify(model, examples, examples=examples, reject=True, out=tmp_path / "x.csv")
    assert result.classifier is not None
    rejection = result.classifier.rejection
    assert rejection is not None
    found = declip.classify(model, [Image.new("RGB", (40, 40), "yellow")] * 2, head=result.classifier, reject=True)
    scores = [max(one.probabilities.values()) for one in found.predictions]
    assert {one.best for one in found.predictions} <= {"none of these", *result.classifier.classes}
    assert scores[0] == scores[1]
    assert 0 <= rejection.lost < rejection.rejected <= 1
    for inner in ("red_thing", "blue_thing"):
        for path in sorted((examples / inner).glob("*.png"))[1:]:
            path.unlink()
    refuses("--reject", declip.classify, model, examples, ["red thing", "blue thing", "green thing"], reject=True)
