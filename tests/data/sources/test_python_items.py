"""Python objects as sources: lists, datasets in torch's way, torchvision's classes; training and evaluation on them."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import declip
from conftest import TINY, refuses
from data.fakes import message, reason_of
from declip.data.columns import Columns
from declip.data.pair import BrokenPair
from declip.data.sources.open import open_source
from declip.recipe.schema import Recipe
from indices import tiny_model


class Shapes:
    """The table's pairs in memory, as a user's dataset has them."""

    def __init__(self, table, broken=()):
        self.rows = [json.loads(line) for line in table.read_text().splitlines()]
        self.folder, self.broken = table.parent, broken

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("the disk is gone")
        row = self.rows[index]
        return {"picture": Image.open(self.folder / row["image"]), "text": row["caption"]}


def test_items_are_dicts_pairs_or_images(folder):
    a = folder / "a.png"
    image, pixels = Image.open(a), np.asarray(Image.open(a).convert("RGB"))
    for item in (
        a,
        str(a),
        a.read_bytes(),
        image,
        pixels,
        {"bytes": a.read_bytes(), "path": "lost"},
    ):
        source = open_source([(item, "x"), (item, ("y", "z "))])
        assert source[0].captions() == ("x",)
        assert source[1].captions() == ("y", "z")
        assert source[1].open().decoded().getpixel((0, 0)) == (0, 0, 0)
        assert source[1].image().shape == pixels.shape
        alone = open_source([item])
        assert alone[0].open().decoded().getpixel((0, 0)) == (0, 0, 0)
        assert reason_of(alone, 0) == "empty caption"
    named = open_source([{"file_name": "a.png", "title": "x"}], Columns(root=folder))
    assert (named[0].captions(), named[0].key) == (("x",), "a.png")
    assert named[0].origin().path == str(a)


def test_a_dict_of_splits_is_not_one_source(folder):
    refuses(
        ["object['train']", "train, test"], open_source, {"train": [folder / "a.png"], "test": []}
    )


def test_items_that_cannot_be_used_are_broken_pairs(table, folder):
    source = open_source(Shapes(table, broken=(0, 3)), Columns(image="picture"))
    assert source[1].captions()[0] == "a red square"
    for read in (source[3].captions, source[3].open):
        with pytest.raises(BrokenPair, match="OSError: the disk is gone"):
            read()
    a = folder / "a.png"
    items = [
        (a, "x"),
        (a, 5),
        (a, " "),
        ("lost.png", "x"),
        (None, "x"),
        (np.zeros((3, 4, 4)), "x"),
        (b"x", "x"),
        7,
    ]
    source = open_source(items)
    reasons = [reason_of(source, n) for n in range(1, len(items))]
    assert reasons == [
        "unreadable item", "empty caption", "missing image", "missing image", "unreadable image", "unreadable image",
        "empty caption",
    ]  # fmt: skip
    root = open_source([("../a.png", "x")], Columns(root=folder))
    assert reason_of(root, 0) == "path outside image root"


def test_items_of_one_group_share_a_number():
    items = [{"image": "a.png", "caption": "a", "product": cell} for cell in ("7", "8", " 7", "")]
    source = open_source(items, Columns(group="product"))
    first, second, third, none = (source.columns["group"][index] for index in range(4))
    assert (first == third != second, none, "group" in open_source(items).columns) == (
        True,
        0,
        False,
    )
    for empty in (math.nan, None, "  "):  # pandas has NaN for an empty cell
        assert (
            open_source([{**items[0], "product": empty}], Columns(group="product")).columns[
                "group"
            ][0]
            == 0
        )
    for given, column in ((items, "produkt"), ([("a.png", "a")], "product")):
        assert "data.columns.group" in message(given, Columns(group=column))


def test_a_data_frame_is_its_rows(table):
    frame = pytest.importorskip("pandas").read_json(table, lines=True)
    frame["caption"] = [
        np.array(captions, object) for captions in frame["caption"]
    ]  # as read from Parquet
    source = open_source(frame, Columns(root=table.parent))
    assert (source.name, len(source), source[3].captions()) == (
        "DataFrame",
        24,
        open_source(table)[3].captions(),
    )


def test_other_objects_are_refused(table):
    for given in (7, {"image": 1}, iter([])):
        assert "__getitem__" in message(given)
    assert "no items" in message([])
    assert "'picture'" in message(Shapes(table))
    assert "data=object" in message("python:Shapes(24)")
    refuses("resolved", declip.train, Recipe.model_validate(TINY), data=Shapes(table))


def test_evaluation_on_an_object(table):
    items = [(table.parent / row["image"], row["caption"]) for row in map(json.loads, table.open())]
    items[5] = (b"", "x")
    model = tiny_model()
    result = declip.evaluate(model, items, "retrieval", progress=False)
    assert (result.images, result.skipped) == (23, {"truncated image": 1})
    kept = declip.evaluate(model, items[:5] + items[6:], "retrieval", progress=False)
    assert result.to_dict() | {"skipped": {}} == kept.to_dict() | {"skipped": {}}
    refuses("no classes", declip.evaluate, model, items)


def test_a_dataset_in_the_way_of_torchvision_has_classes():
    class Cifar(list):
        classes, targets = ("cat", "dog"), [0, 1, 1]

    images = Cifar((Image.new("RGB", (8, 8)), label) for label in Cifar.targets)

    result = declip.evaluate(tiny_model(), images, templates="{}", progress=False)
    assert (result.n, result.classes, result.dataset) == (3, 2, "Cifar")
    assert open_source(images)[2].captions() == ("dog",)
    images[0] = (images[0][0], 2)
    assert reason_of(open_source(images), 0) == "unreadable item"
