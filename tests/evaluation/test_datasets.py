"""Opening what is measured on by its name; tables with a column of labels."""

import json
import pickle
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import refuses
from data.fakes import write
from declip.data.columns import Columns
from declip.data.pair import BrokenPair
from declip.evaluation.datasets import Dataset, open_dataset, with_classes
from declip.evaluation.protocols import evaluate_all
from evaluation import trees


def test_a_named_set(tmp_path):
    trees.pets(tmp_path)
    dataset = open_dataset(f"pets:{tmp_path}")
    assert (dataset.name, dataset.templates) == (f"pets:{tmp_path}", "pets")
    assert dataset.metric == "mean_per_class"
    test, copy = dataset.split("test"), pickle.loads(pickle.dumps(dataset)).split("test")
    assert test.name == "pets"
    assert copy.columns["label"].tolist() == test.columns["label"].tolist()
    missing = r"'pets:.*' has no validation split\. It has: train, test\."
    refuses(missing, dataset.split, "validation")


def test_a_split_is_opened_when_it_is_asked_for_and_once(painted):
    opened = []

    def make(which):
        opened.append(which)
        return painted(["red"] * (which != "validation"))

    dataset = Dataset(
        "mine", {which: partial(make, which) for which in ("train", "validation", "test")}
    )
    assert open_dataset(dataset) is dataset
    assert opened == ["test"]
    assert dataset.split("train") is dataset.split("train")
    assert opened == ["test", "train"]
    refuses("'mine' has no pairs in its validation split", dataset.split, "validation")


def test_an_open_source_is_a_test_split(painted):
    source = painted(["red", "blue"], classes=("red", "blue"), name="builtin:emoji-test")
    dataset = open_dataset(source)
    assert dataset.split("test") is source
    assert (dataset.name, dataset.templates) == ("builtin:emoji-test", "emoji")
    assert dataset.metric == "top1"
    assert open_dataset(painted(["red"])).templates == "plain"
    refuses("'painted' has no pairs", open_dataset, painted([]))


def test_other_splits_of_a_source_are_opened_on_demand(painted):
    source = painted(["red"], name="builtin:icons-test")
    source.other_splits = {"train": lambda: painted(["blue"], name="builtin:icons")}
    dataset = open_dataset(source)
    assert (dataset.name, dataset.templates) == ("builtin:icons-test", "emoji")
    assert list(dataset.openers) == ["train", "test"]
    assert dataset.split("test") is source
    assert dataset.split("train").name == "builtin:icons"


def test_a_folder_with_captions_is_still_one(tmp_path):
    trees.paint(tmp_path / "a.jpg", 3)
    trees.write(tmp_path / "a.txt", "one\ntwo\n")
    dataset = open_dataset(str(tmp_path))
    assert list(dataset.openers) == ["test"]
    assert dataset.split("test")[0].captions() == ("one", "two")
    refuses("has no classes", with_classes, dataset.split("test"))
    refuses("label_column", open_dataset, [(tmp_path / "a.jpg", "one")], label_column="label")


def test_what_cannot_be_opened():
    for given, message in (
        ("pet:/data/x", "'pet'.*'pets'.*cifar10"),
        ("pets:", "'pets:PATH'"),
        ("pets:/nowhere/at/all", "'/nowhere/at/all'.*oxford-iiit-pet/"),
        ("builtin:nothing", "'nothing'"),
        ("C:/nowhere", "does not exist"),
    ):
        refuses(message, open_dataset, given)


ROWS = [
    ("a.jpg", "dog", "train"),
    ("b.jpg", "cat", "test"),
    ("c.jpg", "dog", "test"),
    ("d.jpg", "cat", "val"),
]


@pytest.fixture
def folder(tmp_path):
    for label, (name, *_) in enumerate(ROWS):
        trees.paint(tmp_path / name, label)
    return tmp_path


def _write(folder, kind, head, rows):
    return str(write(folder / f"mine.{kind}", rows, head))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_labels_and_splits(folder, kind):
    dataset = open_dataset(_write(folder, kind, ("image", "Label", "split"), ROWS))
    assert (dataset.name, dataset.templates) == (str(folder / f"mine.{kind}"), "plain")
    found = {}
    for which in dataset.openers:
        source = pickle.loads(pickle.dumps(dataset.split(which)))
        assert source.class_names == ("cat", "dog")
        found[which] = []
        for number, label in enumerate(source.columns["label"].tolist()):
            pair = source[number]
            painted = trees.label_of(pair.open().decoded())
            found[which].append((pair.key, label, painted, pair.captions()))
    assert found == {
        "train": [("a.jpg", 1, 0, ("dog",))],
        "validation": [("d.jpg", 0, 3, ("cat",))],
        "test": [("b.jpg", 0, 1, ("cat",)), ("c.jpg", 1, 2, ("dog",))],
    }


def test_the_column_is_chosen_by_name(folder):
    rows = [("a.jpg", "x", "warm"), ("b.jpg", "y", "cold")]
    path = _write(folder, "csv", ("image", "label", "tempr"), rows)
    assert open_dataset(path).split("test").class_names == ("x", "y")
    assert open_dataset(path, label_column="tempr").split("test").class_names == ("cold", "warm")
    typing_error = r"'mine.csv' 'temper'.*'tempr'.*image, label"
    refuses(typing_error, open_dataset, path, label_column="temper")
    refuses("not a table", open_dataset, f"folder:{folder}", label_column="label")
    rows = [("a.jpg", "one"), ("a.jpg", "two"), ("b.jpg", "three")]
    path = _write(folder, "csv", ("image", "caption"), rows)
    assert "label" not in open_dataset(path).split("test").columns  # it is for retrieval


def test_numbers_as_labels_are_in_the_order_of_numbers(folder):
    rows = [("a.jpg", 10), ("b.jpg", 9), ("c.jpg", 10)]
    for kind in ("csv", "jsonl", "parquet"):
        path = _write(folder, kind, ("image", "label"), rows)
        test = open_dataset(path).split("test")
        assert (test.class_names, test.columns["label"].tolist()) == (("9", "10"), [1, 0, 1])


def test_images_in_parquet_with_the_names_that_hugging_face_keeps(folder):
    images = [{"bytes": (folder / name).read_bytes(), "path": None} for name, *_ in ROWS]
    table = pa.table({"image": images, "label": [2, 0, -1, 2]})
    features = {"label": {"names": ["ape", "bee", "cow"], "_type": "ClassLabel"}}
    known = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(known), folder / "hf.parquet")
    test = pickle.loads(pickle.dumps(open_dataset(str(folder / "hf.parquet")).split("test")))
    assert test.class_names == ("ape", "bee", "cow")
    assert test.columns["label"].tolist() == [2, 0, 0, 2]
    assert (trees.label_of(test[3].open().decoded()), test[3].captions()) == (3, ("cow",))
    with pytest.raises(BrokenPair, match=r"missing label: row 2 \('-1'"):
        test[2].captions()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_rows_without_a_label_or_with_two_are_broken_pairs(folder, kind):
    labels = {"a": ["dog"], "b": [" "], "c": ["cat", "cat"], "d": ["cat", "dog"]}
    rows = [(f"{name}.jpg", label) for name, own in labels.items() for label in own]
    test = open_dataset(_write(folder, kind, ("image", "label"), rows)).split("test")
    assert test.class_names == ("cat", "dog")
    assert len(test) == 4
    with pytest.raises(BrokenPair, match="missing label"):
        test[1].captions()
    assert (test[2].key, test[2].captions()) == ("c.jpg", ("cat",))
    with pytest.raises(BrokenPair, match=r"conflicting labels: .*\(cat, dog\)"):
        test[3].captions()


def test_retrieval_takes_captioned_images_whatever_their_labels(folder, model):
    rows = [
        ("a.jpg", "dog", "a"),
        ("b.jpg", " ", "b"),
        ("c.jpg", "cat", "c"),
        ("d.jpg", "cat", "d"),
    ]
    table = _write(
        folder, "csv", ("image", "label", "caption"), [*rows, ("d.jpg", "dog", "also d")]
    )
    classes, pairs = evaluate_all(model, table, ["zero-shot", "retrieval"])
    assert (classes.n, classes.skipped) == (2, {"missing label": 1, "conflicting labels": 1})
    assert (pairs.images, pairs.text_to_image.queries, pairs.skipped) == (4, 5, {})
    alone = open_dataset(table, label_column="label", captioned=False).split("test")
    assert (alone.captioned, alone[0].captions()) == (False, ("dog",)), (
        "captions are not read where none is used"
    )


@pytest.mark.parametrize("column", ["label", "category"])
@pytest.mark.parametrize("value", ["shapes", ""])
def test_one_value_of_all_captioned_images_is_no_class(folder, model, column, value):
    names = ("image", column, "caption")
    table = _write(folder, "csv", names, [("a.jpg", value, "one"), ("b.jpg", value, "two")])
    (pairs,) = evaluate_all(model, table, ["retrieval"])
    assert pairs.images == 2
    assert "label" not in open_dataset(table).split("test").columns
    for options in ({"label_column": column}, {"columns": Columns(caption=None)}):
        refuses(f"'{column}'.*at least two", open_dataset, table, **options)


def test_what_cannot_be_measured(folder):
    for one, other, message in (
        (("x", "test"), ("x", "test"), "has 1 classes"),
        (("x", "train"), ("y", "val"), "no test pairs.*train, validation"),
        (("x", "test"), ("y", "tst"), "'tst'.*train, validation, test"),
        (("x", "test"), ("y", ""), "''.*train, validation, test"),
    ):
        table = _write(
            folder, "csv", ("image", "label", "split"), [("a.jpg", *one), ("b.jpg", *other)]
        )
        refuses(message, open_dataset, table)
