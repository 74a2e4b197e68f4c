"""Classes of a classifier: rows from weights, names from ImageNet or from a file."""

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from conftest import refuses
from declip.interchange.classes import Classes, read_names, texts_digest
from declip.interchange.read import read, read_start


def read_timm(folder, name, count=1000, **others):
    """Weights of a timm classifier, and the classifier."""
    model = timm.create_model(name, num_classes=count).eval()
    save_file(model.state_dict() | others, folder / "w.safetensors")
    return read(f"timm:{name}/{folder / 'w.safetensors'}"), model


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_efficientnet", "test_byobnet", "test_convnext"])
def test_rows_multiply_the_pooled_feature(name, tmp_path):
    weights, model = read_timm(tmp_path, name)
    pixels = torch.randn(2, 3, weights.recipe.image.size, weights.recipe.image.size)
    with torch.no_grad():
        logits = weights.build().eval().encode_backbone(pixels) @ weights.classes.rows.T
        torch.testing.assert_close(logits + model.get_classifier().bias, model(pixels), atol=1e-5, rtol=1e-4)
    assert weights.classes.names[0] == "tench, Tinca tinca"
    assert weights.classes.definitions[0].startswith("freshwater")


def test_a_head_of_several_layers_has_no_classes(tmp_path):
    assert read_timm(tmp_path, "test_vit", **{"head.fc1.weight": torch.ones(5, 64)})[0].classes is None


def test_names_and_definitions_become_texts_of_their_class(tmp_path):
    table, plain = tmp_path / "names.csv", tmp_path / "names.txt"
    table.write_text('definition,name\n"a fruit, red",apple\n,pear\n', encoding="utf-8-sig")
    plain.write_text(" apple \npear\n", encoding="utf-8")
    classes = Classes(torch.ones(2, 3), torch.zeros(3))
    texts, owners = classes.with_names(table).texts()
    assert (texts, owners.tolist()) == (["apple", "pear", "apple: a fruit, red"], [0, 1, 0])
    assert classes.with_names(plain).texts()[0] == ["apple", "pear"]


def test_measured_features_are_those_of_the_same_names_alone(tmp_path):
    classes, file = (
        Classes(torch.ones(2, 3), torch.zeros(3), ("apple", "pear"), ("", "")),
        tmp_path / "names.safetensors",
    )
    stored = {
        "features": torch.tensor([[127, 0], [-64, 127]], dtype=torch.int8),
        "scales": torch.tensor([[0.1], [1.0]]),
    }
    save_file(stored, file, {"texts": texts_digest(["apple", "pear"])})
    features = classes.with_features(file).features
    torch.testing.assert_close(features, torch.tensor([[12.7, 0.0], [-64.0, 127.0]]))
    assert replace(classes, names=("pear", "apple")).with_features(file).features is None
    (tmp_path / "other.txt").write_text("pear\napple\n")
    assert classes.with_features(file).with_names(tmp_path / "other.txt").features is None


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("names.txt", b"cat\ndog\ncat\n", ("'cat'", "2 times")),
        ("names.txt", b"cat\n\ndog\n", ("Name 2", "finetune.class_names")),
        ("names.txt", b"\xff\xfe\n", ("finetune.class_names",)),
        ("names.csv", b"title\ncat\n", ("'name'", "finetune.class_names")),
        ("names.tsv", b"name\tdefinition\n\ta pet\n", ("Name 1",)),
        ("missing.txt", None, ("missing.txt", "finetune.class_names")),
    ],
)
def test_files_that_do_not_name_every_class(tmp_path, file, content, words):
    if content is not None:
        (tmp_path / file).write_bytes(content)
    refuses(words, read_names, tmp_path / file)


def test_classes_need_as_many_names(tmp_path):
    weights, _ = read_timm(tmp_path, "test_vit", count=7)
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n", encoding="utf-8")
    refuses(r"2 names.*7 classes", weights.named_classes, str(names))
    refuses(r"finetune\.class_names", weights.named_classes, required=True)
    assert weights.named_classes() is None
    names.write_text("\n".join("abcdefg"), encoding="utf-8")
    found = weights.named_classes(str(names))
    assert found.names == tuple("abcdefg")


def test_names_without_a_classifier_are_refused(tmp_path):
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), tmp_path / "w.safetensors")
    weights = read_start(f"timm:test_vit/{tmp_path / 'w.safetensors'}")
    assert weights.classes is None
    for file in (None, "names.txt"):
        refuses(r"no classifier.*finetune\.class_pairs", weights.named_classes, file, required=True)
