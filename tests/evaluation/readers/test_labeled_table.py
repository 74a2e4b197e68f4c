"""Tables with a column of labels."""

import json
import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import refuses
from data.tables import write
from declip.data.pair import BrokenPair
from declip.evaluation.datasets import open_dataset
from declip.evaluation.protocols import evaluate_all
from evaluation import trees

ROWS = [("a.jpg", "dog", "train"), ("b.jpg", "cat", "test"), ("c.jpg", "dog", "test"), ("d.jpg", "cat", "val")]


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
        found[which] = [
            (source[i].key, int(source.labels[i]), trees.label_of(source[i].image), source.captions(i))
            for i in range(len(source))
        ]
    assert found == {
        "train": [("a.jpg", 1, 0, ("dog",))],
        "validation": [("d.jpg", 0, 3, ("cat",))],
        "test": [("b.jpg", 0, 1, ("cat",)), ("c.jpg", 1, 2, ("dog",))],
    }


def test_captions_stay_with_labels_and_all_rows_are_the_test(folder):
    rows = [(name, label, f"a photo of one {label}") for name, label, _ in ROWS]
    dataset = open_dataset(_write(folder, "jsonl", ("image", "class_name", "caption"), rows))
    assert list(dataset.openers) == ["test"]
    test = dataset.split("test")
    assert test.labels.tolist() == [1, 0, 1, 0]
    assert test[0].captions == ("a photo of one dog",)


def test_the_column_is_chosen_by_name(folder):
    rows = [("a.jpg", "x", "warm"), ("b.jpg", "y", "cold")]
    path = _write(folder, "csv", ("image", "label", "tempr"), rows)
    assert open_dataset(path).split("test").class_names == ("x", "y")
    assert open_dataset(path, label_column="tempr").split("test").class_names == ("cold", "warm")
    refuses(r"'mine.csv' 'temper'.*'tempr'.*image, label", open_dataset, path, label_column="temper")
    refuses("not a table", open_dataset, f"folder:{folder}", label_column="label")
    path = _write(folder, "csv", ("image", "caption"), [("a.jpg", "one"), ("a.jpg", "two"), ("b.jpg", "three")])
    assert open_dataset(path).split("test").labels is None  # it is for retrieval


def test_numbers_as_labels_are_in_the_order_of_numbers(folder):
    for kind in ("csv", "jsonl", "parquet"):
        path = _write(folder, kind, ("image", "label"), [("a.jpg", 10), ("b.jpg", 9), ("c.jpg", 10)])
        test = open_dataset(path).split("test")
        assert (test.class_names, test.labels.tolist()) == (("9", "10"), [1, 0, 1])


def test_images_in_parquet_with_the_names_that_hugging_face_keeps(folder):
    images = [{"bytes": (folder / name).read_bytes(), "path": None} for name, *_ in ROWS]
    table = pa.table({"image": images, "label": [2, 0, -1, 2]})
    features = {"label": {"names": ["ape", "bee", "cow"], "_type": "ClassLabel"}}
    known = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    pq.write_table(table.replace_schema_metadata(known), folder / "hf.parquet")
    test = pickle.loads(pickle.dumps(open_dataset(str(folder / "hf.parquet")).split("test")))
    assert test.class_names == ("ape", "bee", "cow")
    assert test.labels.tolist() == [2, 0, 0, 2]
    assert (trees.label_of(test[3].image), test[3].captions) == (3, ("cow",))
    with pytest.raises(BrokenPair, match=r"missing label: row 2 \('-1'"):
        test[2]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_rows_without_a_label_or_with_two_are_broken_pairs(folder, kind):
    rows = [("a.jpg", "dog"), ("b.jpg", " "), ("c.jpg", "cat"), ("d.jpg", "cat"), ("d.jpg", "dog"), ("c.jpg", "cat")]
    test = open_dataset(_write(folder, kind, ("image", "label"), rows)).split("test")
    assert test.class_names == ("cat", "dog")
    assert len(test) == 4
    for read in (test.__getitem__, test.captions):
        with pytest.raises(BrokenPair, match="missing label"):
            read(1)
    assert (test[2].key, test[2].captions) == ("c.jpg", ("cat",))
    with pytest.raises(BrokenPair, match=r"conflicting labels: .*\(cat, dog\)"):
        test[3]


def test_a_damaged_row_is_counted_in_the_test(folder):
    trees.write(folder / "mine.csv", "image,label,split\na.jpg,x,train\nb.jpg,y,test\nbroken row\n")
    test = open_dataset(str(folder / "mine.csv")).split("test")
    with pytest.raises(BrokenPair, match="unreadable row"):
        test[1]


def test_retrieval_takes_captioned_images_whatever_their_labels(folder, model):
    rows = [("a.jpg", "dog", "a"), ("b.jpg", " ", "b"), ("c.jpg", "cat", "c"), ("d.jpg", "cat", "d")]
    table = _write(folder, "csv", ("image", "label", "caption"), [*rows, ("d.jpg", "dog", "also d")])
    classes, pairs = evaluate_all(model, table, ["zero-shot", "retrieval"])
    assert (classes.n, classes.skipped) == (2, {"missing label": 1, "conflicting labels": 1})
    assert (pairs.images, pairs.text_to_image.queries, pairs.skipped) == (4, 5, {})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a.jpg", "x", "test"), ("b.jpg", "x", "test")], "has 1 classes"),
        ([("a.jpg", "x", "train"), ("b.jpg", "y", "val")], "no test pairs.*train, validation"),
        ([("a.jpg", "x", "test"), ("b.jpg", "y", "tst")], "'tst'.*train, validation, test"),
        ([("a.jpg", "x", "test"), ("b.jpg", "y", "")], "''.*train, validation, test"),
    ],
)
def test_what_cannot_be_measured(folder, rows, message):
    refuses(message, open_dataset, _write(folder, "csv", ("image", "label", "split"), rows))
