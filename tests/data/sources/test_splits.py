"""Splits of a source: training takes the train rows, and never the others."""

import json

import pytest

from conftest import refuses
from data.tables import KINDS, write
from declip.data.prepare import shard_source
from declip.data.sources.open import open_source
from declip.data.sources.subset import Subset, take, training_part
from declip.errors import UserError
from declip.evaluation.datasets import open_dataset

ROWS = [("a.png", "one", "train"), ("b.png", "two", "Test"), ("c.png", "three", " val "), ("d.png", "four", "training")]
NAMES = ("image", "caption", "Split")


def captions(source):
    return [source.captions(index)[0] for index in range(len(source))]


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_is_trained_on_by_its_train_rows(folder, kind):
    path = write(folder / f"t.{kind}", ROWS, NAMES)
    source = open_source(path)
    assert {name: places.tolist() for name, places in source.splits().items()} == {
        "train": [0, 3],
        "validation": [2],
        "test": [1],
    }
    part = training_part(source)
    assert (part.name, captions(part)) == (f"t.{kind} (train)", ["one", "four"])
    assert captions(open_dataset(path).split("test")) == ["two"]
    # An image with rows in two splits is not trained on.
    again = open_source(write(folder / f"again.{kind}", [*ROWS, ("a.png", "five", "test")], NAMES))
    assert again.splits()["train"].tolist() == [3]
    assert training_part(open_source(write(folder / f"all.{kind}", ROWS[:1], NAMES))).name == f"all.{kind}"
    with pytest.raises(UserError, match=r"no training pairs: .*validation, test"):
        training_part(open_source(write(folder / f"none.{kind}", ROWS[1:3], NAMES)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("cells", "found"),
    [
        (["1", "2", "3", "4"], {}),
        (["", "", "", ""], {}),
        (["train", "test", "", "train"], "''"),
        (["train", "test", "tset", "train"], "'tset'"),
    ],
)
def test_cells_that_name_no_split(folder, kind, cells, found):
    rows = [(*row[:2], cell) for row, cell in zip(ROWS, cells, strict=True)]
    source = open_source(write(folder / f"t.{kind}", rows, NAMES))
    if found == {}:
        assert training_part(source) is source
    else:
        refuses(rf"'Split'.*{found}", source.splits)


def test_unreadable_rows_are_in_each_split(folder):
    lines = [json.dumps(dict(zip(NAMES, row, strict=True))) for row in ROWS]
    (folder / "t.jsonl").write_text("\n".join([*lines, "{broken"]))
    splits = open_source(folder / "t.jsonl").splits()
    assert [splits[name].tolist() for name in splits] == [[0, 3, 4], [2, 4], [1, 4]]


def test_folders_lists_and_subsets_have_splits(folder):
    for number, which in enumerate(("train", "val", "test")):
        (folder / "photos" / which).mkdir(parents=True)
        (folder / "photos" / which / "a.png").write_bytes((folder / "a.png").read_bytes())
        (folder / "photos" / which / "a.txt").write_text(f"caption {number}")
    assert captions(training_part(open_source(folder / "photos"))) == ["caption 0"]
    assert captions(open_dataset(folder / "photos").split("test")) == ["caption 2"]
    items = [dict(zip(NAMES, row, strict=True)) for row in ROWS]
    assert captions(training_part(open_source(items))) == ["one", "four"]
    assert captions(training_part(take(open_source(items), 4, 0))) == ["one", "four"]
    assert captions(training_part(Subset(open_source(items), take(open_source(items), 4, 0).indices[1:]))) == ["four"]

    # Not a list: reading an item may decode its image.
    numbered = type("Items", (), {"__len__": lambda _: 4, "__getitem__": lambda _, index: items[index]})()
    refuses(r"'Split'.*list", training_part, open_source(numbered))


def test_shards_hold_the_training_pairs_alone(folder, tmp_path):
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes())
    made = shard_source(write(folder / "t.csv", ROWS, NAMES), tmp_path / "shards", workers=0)
    assert captions(open_source(tmp_path / "shards")) == ["one", "four"]
    assert made.skipped.counts == {"split test": 1, "split validation": 1}
