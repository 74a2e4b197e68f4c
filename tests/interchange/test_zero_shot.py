"""Classes of a classifier, and models without pairs: projections from the names, computed once, in every format."""

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import declip
from conftest import refuses, write_table
from declip.closed_form.heads import fit_heads
from declip.closed_form.pairs import ClassPairs, Pairs
from declip.closed_form.related import class_neighbors
from declip.closed_form.solve import DEFAULT_FORM
from declip.interchange import starter
from declip.interchange.classes import Classes, read_names, texts_digest
from declip.interchange.export import export
from declip.interchange.read import read, read_start
from declip.interchange.timm_weights import (
    LOGIT_SCALE,
    class_heads,
    class_start,
    complete,
    encode_texts,
)
from declip.models.hf_encoder import read_encoder
from declip.models.layers import PROJECTIONS
from declip.models.neighbors import INNER
from declip.models.posteriors import PosteriorProjection
from declip.recipe.starts import STARTS
from interchange.towers import EXACT, unprojected
from text_encoders import bert

COUNT = 60


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DECLIP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "heads"


def test_projections_compare_as_the_closed_form_does():
    weights = unprojected()
    model, classes = complete(weights).build().eval(), weights.classes
    texts = encode_texts(weights, list(classes.names))
    pairs = ClassPairs(classes.rows, texts, torch.arange(COUNT), classes.mean)
    nothing = Pairs(
        torch.empty(0, classes.rows.shape[1]), torch.empty(0, texts.shape[1]), torch.empty(0).long()
    )
    heads = fit_heads(nothing, pairs, 1.0, DEFAULT_FORM)
    features = model.encode_text(model.tokenize(classes.names))
    images = torch.nn.functional.normalize(model.image_tower.proj(classes.rows), dim=-1)
    exact = ClassPairs(classes.rows.double(), texts.double(), pairs.owners, classes.mean.double())
    heads = heads._replace(neighbors=class_neighbors(heads, exact))
    expected = heads.similarities(classes.rows.double(), texts.double()).float()
    torch.testing.assert_close(images @ features.T, expected, atol=EXACT, rtol=0)
    again = class_start(weights, texts).similarities(classes.rows, texts)
    torch.testing.assert_close(again, expected, atol=EXACT, rtol=0)
    assert float(expected.diagonal().mean()) > float(expected.mean()) + 0.1
    assert float(model.logit_scale.detach().exp()) == pytest.approx(LOGIT_SCALE)
    assert (model.preprocessor.size, model.recipe and model.recipe.embed_dim) == (
        64,
        texts.shape[1] + COUNT,
    )


def test_projections_are_computed_once_for_a_classifier_and_its_names(cache, monkeypatch):
    weights = unprojected()
    classes = weights.classes
    first = complete(weights)
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    again = complete(weights)
    assert file.stat().st_mtime_ns == written
    others = (
        replace(classes, names=("a pear", *classes.names[1:])),
        replace(classes, definitions=("red", *[""] * (COUNT - 1))),
        replace(classes, rows=classes.rows + torch.eye(COUNT, classes.rows.shape[1])),
        replace(classes, mean=classes.mean + 1),
    )
    for number, other in enumerate(others, start=2):
        complete(replace(weights, classes=other))
        assert len(list(cache.iterdir())) == number
    file.unlink()  # mapped into memory above
    file.write_bytes(b"half")
    repaired = complete(weights)
    for name in first.tensors:
        assert torch.equal(first.tensors[name], again.tensors[name])
        assert torch.equal(first.tensors[name], repaired.tensors[name])
    monkeypatch.setenv("DECLIP_CACHE", str(file))  # no folder: it only costs time
    complete(weights).build()


def test_projections_do_not_depend_on_the_order_of_sums():
    weights = unprojected()
    classes = weights.classes
    texts, order = encode_texts(weights, list(classes.names)), torch.randperm(COUNT)
    other = replace(
        classes, rows=classes.rows[order], names=tuple(classes.names[number] for number in order)
    )
    of_order, second = class_heads(classes, texts), class_heads(other, texts[order])
    inner, back = f"image_tower.proj.{INNER}", order.argsort()
    weight = second[f"{inner}weight"]
    width = weight.shape[1] - COUNT  # then a column for each class
    columns = [weight[:, :width], weight[:, width:][:, back]]
    second[f"{inner}weight"] = torch.cat(columns, dim=1)
    of_classes = (f"{inner}classes", *(f"{prefix}anchors" for prefix in PROJECTIONS))
    for name in of_classes:
        second[name] = second[name][back]
    for name, first in of_order.items():
        assert torch.equal(first, second[name]), name
        # Above the noise of 1e-14 of full-size towers
        assert torch.equal(first * 2**24, (first * 2**24).round())


@pytest.mark.parametrize(
    ("format", "lacks"), [("safetensors", ""), ("open_clip", "class posteriors and neighbors")]
)
def test_formats_of_linear_projections_lack_the_rest(format, lacks, tmp_path):
    model, pixels = complete(unprojected("timm-convnext")).build().eval(), torch.randn(2, 3, 64, 64)
    weight = model.image_tower.proj.projection.weight
    exported = export(model, format, tmp_path / "out")
    assert (exported.difference < 1e-5, lacks in exported.limits, bool(exported.limits)) == (
        True,
        True,
        bool(lacks),
    )
    if lacks:
        features = model.encode_backbone(pixels)
        linear = torch.nn.functional.normalize(features @ weight[:, : features.shape[1]].T, dim=-1)
        read_back = declip.load(tmp_path / "out", "cpu").encode_image(pixels)
        torch.testing.assert_close(read_back, linear, atol=EXACT, rtol=0)
        assert exported.limits in (tmp_path / "out/README.md").read_text()


def test_a_linear_projection_ignores_the_mean_direction_also_after_steps_of_adam():
    # random weights have a part in it
    projection = PosteriorProjection(16, 3, 8)
    pooled = torch.randn(4, 16)
    projection.direction.copy_(F.normalize(torch.randn(16), dim=0))
    torch.testing.assert_close(
        projection.linear()(pooled + projection.direction), projection.linear()(pooled)
    )


def test_posteriors_of_a_wrong_shape_are_refused_before_memory_is_taken():
    weights = complete(unprojected("timm-convnext"))
    hostile = {f"{PROJECTIONS[0]}classes": torch.zeros(2**62, 0)}  # which has no bytes
    refuses(
        "do not fit their recipe", replace(weights, tensors={**weights.tensors, **hostile}).check
    )


def test_weights_with_projections_or_without_names_stay_as_they_are():
    weights = unprojected()
    for same in (
        complete(weights),
        replace(weights, classes=None),
        replace(weights, classes=replace(weights.classes, names=())),
    ):
        assert complete(same) is same
    refuses(
        "no projections, nor a classifier with known names", replace(weights, classes=None).build
    )


@pytest.mark.skipif(
    not starter.installed(), reason="the packages of the built-in start are not installed"
)
@pytest.mark.parametrize("name", [*filter(starter.installed, STARTS)])
def test_a_builtin_start_is_a_whole_model_except_for_training(name, tmp_path):
    start = read_start(name)
    assert not any(tensor.startswith(PROJECTIONS) for tensor in start.tensors)
    assert (start.recipe.text.hf_model, start.classes.size) == (name, STARTS[name])
    if name != "builtin:lite0-minilm":
        return  # the others differ in the size of their image tower alone
    for letter, color in (("a", "red"), ("b", "blue")):
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{letter}.png")
    images = [str(tmp_path / f"{name}.png") for name in "ab"]
    whole = declip.embed(declip.load(name, device="cpu"), images, out=tmp_path / "whole")
    declip.embed(name, images, out=tmp_path / "index", precision="fp32")
    parts = declip.Index.open(tmp_path / "index")
    assert not parts.text_model.has_image
    assert [hit.score for hit in parts.search("an apple")] == [
        hit.score for hit in whole.search("an apple")
    ]


@pytest.mark.skipif(
    not starter.installed("builtin:lite0-minilm"), reason="the built-in start is not installed"
)
def test_a_fit_from_a_builtin_start_is_exported(tmp_path, monkeypatch):
    # Only the export that is asked for
    monkeypatch.setattr("declip.fitting.run.export_complete", lambda *_: None)
    monkeypatch.setattr("declip.finetuning.outputs.write_finetuned", lambda *_: None)
    for color in ("red", "blue"):
        Image.new("RGB", (40, 40), color).save(tmp_path / f"{color}.png")
    pairs = write_table(tmp_path / "pairs.csv", ["red.png,a red square", "blue.png,a blue square"])
    keys = {"finetune.class_pairs": False}
    run = declip.finetune(pairs, "builtin:lite0-minilm", keys, tmp_path / "run", progress=False)
    declip.export(run, "open_clip", tmp_path / "out")
    assert (tmp_path / "out/open_clip_model.safetensors").is_file()


@pytest.mark.skipif(
    not starter.installed(), reason="the packages of the built-in start are not installed"
)
def test_the_builtin_text_encoder_is_what_transformers_reads():
    """And the features of names that come with it are its own."""
    package, _, name = starter.TEXT_FOLDER.partition("/")
    folder = Path(find_spec(package).origin).parent / name
    expected, weights = read_encoder(str(folder), pretrained=True), read_start(starter.NAME)
    assert weights.encoder == replace(expected, folder=None)
    built = expected.build().state_dict()
    assert all(
        torch.equal(tensor, weights.tensors[f"text_tower.encoder.{name}"])
        for name, tensor in built.items()
    )
    texts = encode_texts(weights, weights.classes.texts()[0][:40])
    assert float(torch.cosine_similarity(weights.classes.features[:40], texts).min()) > 0.9998


def test_a_classifier_in_half_precision_is_computed_with_in_float32():
    classes = Classes.of(torch.ones(4, 3, dtype=torch.float16), torch.zeros(3).half())
    assert (classes.rows.dtype, classes.mean.dtype) == (torch.float32, torch.float32)


def test_an_image_classifier_of_timm_with_a_text_encoder_is_a_model_without_pairs(tmp_path):
    torch.manual_seed(0)
    bert(tmp_path / "bert")
    # 1,000 classes
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
    name = f"timm:test_vit/{tmp_path / 'vit.safetensors'}+{tmp_path / 'bert'}"
    start, image = read_start(name), read_start(name.partition("+")[0])
    assert (start.has_text, start.projected, image.has_text) == (True, False, False)
    assert torch.equal(
        *(weights.tensors["image_tower.trunk.cls_token"] for weights in (start, image))
    )
    expected = load_file(tmp_path / "bert" / "model.safetensors")
    word = "embeddings.word_embeddings.weight"
    assert torch.equal(
        start.tensors[f"text_tower.encoder.{word}"],
        expected[next(n for n in expected if n.endswith(word))],
    )
    model = declip.load(name, device="cpu")
    classes = start.classes
    with torch.no_grad():
        images = torch.nn.functional.normalize(model.image_tower.proj(classes.rows[:50]), dim=-1)
        texts = model.encode_text(model.tokenize(classes.names[:50]))
    similarities = images @ texts.T
    assert float(similarities.diagonal().mean()) > float(similarities.mean()) + 0.02
    exported = export(name, "safetensors", tmp_path / "out")
    assert exported.difference is not None
    assert exported.difference < EXACT
    refuses(
        r"text\.hf_model 'nowhere'",
        declip.load,
        f"timm:test_vit/{tmp_path / 'vit.safetensors'}+nowhere",
    )


def read_timm(folder, name, count=1000, **others):
    """Weights of a timm classifier, and the classifier."""
    model = timm.create_model(name, num_classes=count).eval()
    save_file(model.state_dict() | others, folder / "w.safetensors")
    return read(f"timm:{name}/{folder / 'w.safetensors'}"), model


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_efficientnet", "test_byobnet", "test_convnext"]
)
def test_rows_multiply_the_pooled_feature(name, tmp_path):
    weights, model = read_timm(tmp_path, name)
    pixels = torch.randn(2, 3, weights.recipe.image.size, weights.recipe.image.size)
    logits = weights.build().eval().encode_backbone(pixels) @ weights.classes.rows.T
    torch.testing.assert_close(
        logits + model.get_classifier().bias, model(pixels), atol=1e-5, rtol=1e-4
    )
    assert weights.classes.names[0] == "tench, Tinca tinca"
    assert weights.classes.definitions[0].startswith("freshwater")


def test_names_and_definitions_become_texts_of_their_class(tmp_path):
    table, plain = tmp_path / "names.csv", tmp_path / "names.txt"
    table.write_text('definition,name\n"a fruit, red",apple\n,pear\n', encoding="utf-8-sig")
    plain.write_text(" apple \npear\n", encoding="utf-8")
    classes = Classes(torch.ones(2, 3), torch.zeros(3))
    texts, owners = classes.with_names(table).texts()
    assert (texts, owners.tolist()) == (["apple", "pear", "apple: a fruit, red"], [0, 1, 0])
    assert classes.with_names(plain).texts()[0] == ["apple", "pear"]


def test_measured_features_are_those_of_the_same_names_alone(tmp_path):
    classes = Classes(torch.ones(2, 3), torch.zeros(3), ("apple", "pear"), ("", ""))
    stored = torch.tensor([[127, 0], [-64, 127]], dtype=torch.int8)
    file = tmp_path / "names.safetensors"
    scales = torch.tensor([[0.1], [1.0]])
    save_file(
        {"features": stored, "scales": scales}, file, {"texts": texts_digest(["apple", "pear"])}
    )
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
    assert weights.named_classes(str(names)).names == tuple("abcdefg")


@pytest.mark.parametrize(
    ("count", "others"), [(0, {}), (1000, {"head.fc1.weight": torch.ones(5, 64)})]
)
def test_without_a_classifier_of_one_layer_there_are_no_classes(tmp_path, count, others):
    weights, _ = read_timm(tmp_path, "test_vit", count, **others)
    assert weights.classes is None
    for file in (None, "names.txt"):
        refuses(r"no classifier.*finetune\.class_pairs", weights.named_classes, file, required=True)
