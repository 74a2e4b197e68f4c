"""Splitting off a validation part: no image and no caption on both sides."""

import json

import pytest

from conftest import refuses, texture, write_table
from declip.data.columns import Columns
from declip.data.sources.open import open_source
from declip.data.sources.pair_list import PairList, write_pair_list
from declip.inspection.scan import inspect_source
from declip.inspection.split import check_copies, split_pairs


def write(folder, rows):
    folder.mkdir(exist_ok=True)
    for number, (image, _) in enumerate(rows):
        image.save(folder / f"{number}.png")
    return write_table(
        folder / "pairs.csv",
        [f"{number}.png,{caption}" for number, (_, caption) in enumerate(rows)],
    )


def distinct(count, first=0):
    return [(texture(number), f"caption {number}") for number in range(first, first + count)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """60 pairs: in 20 groups of three, the first two show one image in two sizes, the last two share a caption."""
    rows = []
    for group in range(20):
        rows += [(texture(group), f"first of {group}"), (texture(group, 96), f"common to {group}")]
        rows.append((texture(100 + group), f"Common  to {group}"))
    return write(tmp_path_factory.mktemp("groups") / "x", rows)


def test_groups_stay_on_one_side(pairs):
    source = open_source(pairs)
    train, val = split_pairs(source)
    assert sorted([*train, *val]) == list(range(60))
    assert 3 <= len(val) <= 12
    assert not set(train // 3) & set(val // 3)
    assert len(split_pairs(source, most=4).val) == 3


def test_training_pairs_stay_so_when_others_are_added(tmp_path):
    """Also where a new pair shows a known image or has a known caption."""
    new = [
        (texture(number), f"caption {number if number % 4 else number // 5}")
        for number in range(120, 140)
    ]
    new += [(texture(number, 40), f"new caption {number}") for number in range(20)]
    table = write(tmp_path / "x", [*distinct(120), *new])
    lines = table.read_text().splitlines(keepends=True)
    parts = {}
    for count in (120, 121, 160):
        table.write_text("".join(lines[: 1 + count]))
        parts[count] = split_pairs(open_source(table))
        assert 0.05 <= len(parts[count].val) / count <= 0.2
        assert set(parts[120].train) <= set(parts[count].train)


def test_a_pair_that_raises_the_size_of_the_validation_part_moves_none(tmp_path):
    table = write(tmp_path / "x", distinct(26, first=200))  # 25 have 2 in it, 26 have 3
    lines = table.read_text().splitlines(keepends=True)
    whole = split_pairs(open_source(table))
    table.write_text("".join(lines[:26]))
    assert set(split_pairs(open_source(table)).train) <= set(whole.train)


def test_copies_before_old_pairs_move_none_into_validation(tmp_path):
    rows = distinct(240)
    copies = [(texture(number, 40), f"new caption {number}") for number in range(0, 240, 5)]
    old = split_pairs(open_source(write(tmp_path / "old", rows)))
    new = split_pairs(open_source(write(tmp_path / "new", [*copies, *rows])))
    assert set(new.val[new.val >= len(copies)] - len(copies)) <= set(old.val)


def test_a_validation_part_has_about_the_largest_size(tmp_path):
    source = open_source(write(tmp_path / "x", distinct(150)))
    assert 3 <= len(split_pairs(source, most=5).val) <= 7


def test_few_pairs_have_a_validation_part_near_the_fraction(tmp_path):
    for count in (20, 40, 64):
        source = open_source(write(tmp_path / str(count), distinct(count, 100 * count)))
        assert count // 20 <= len(split_pairs(source).val) <= count // 5


@pytest.fixture
def sixty(tmp_path):
    table = write(tmp_path / "x", distinct(60))
    head, *rows = table.read_text().splitlines()
    return table, head, rows


def test_a_column_of_splits_is_obeyed(sixty):
    table, head, rows = sixty

    def parts(of, rest):
        named = [f"{row},{of.get(number, rest)}" for number, row in enumerate(rows)]
        table.write_text("\n".join([f"{head},split", *named]))
        return split_pairs(open_source(table))

    train, val = parts({3: "val", 4: "test", 5: "val"}, "train")
    assert (len(train), val.tolist()) == (57, [3, 5])
    train, val = parts(dict.fromkeys(range(20), "test"), "train")
    assert sorted([*train, *val]) == list(range(20, 60))
    assert 2 <= len(val) <= 8


def test_copies_across_a_given_split_are_counted_or_refused(sixty, caplog):
    table, head, rows = sixty
    copied = [f"copy-{number}.png,again {number}" for number in range(20)]
    for number in range(20):
        texture(number, 40).save(table.parent / f"copy-{number}.png")

    def split(copies):
        named = [f"{row},train" for row in rows[:50]]
        named += [f"{row},val" for row in [*copied[:copies], *rows[50:]]]
        table.write_text("\n".join([f"{head},split", *named]))
        return split_pairs(open_source(table))

    assert len(split(2).val) == 12
    assert "16.7 % of the images" in caplog.text
    found = {each.rule: each.number for each in inspect_source(table).findings}
    assert found["split_copies"] == pytest.approx(2 / 12)
    refuses(("66.7 %", "split"), split, 20)
    split(0)
    seen = write(
        table.parent / "seen", [(texture(number, 60), f"seen {number}") for number in range(50, 60)]
    )
    caplog.clear()
    assert split_pairs(open_source(table), seen=open_source(seen)).val.tolist() == [*range(50, 60)]
    assert "The weights were trained on these pairs" in caplog.text


def test_pairs_that_the_start_was_trained_on_are_not_held_out(pairs, tmp_path, caplog):
    source = open_source(pairs)
    seen = [(texture(group, 60), f"seen {group}") for group in range(10)]
    val = split_pairs(source, seen=open_source(write(tmp_path / "seen", seen))).val
    assert len(val) >= 3
    assert val.min() >= 30
    assert caplog.text == ""
    # Nearly all were
    assert split_pairs(source, seen=source).val.tolist() == split_pairs(source).val.tolist()
    assert "--val" in caplog.text


def test_photos_of_one_product_stay_on_one_side(sixty):
    table, head, rows = sixty
    named = [f"{row},{'' if number > 50 else number // 3}" for number, row in enumerate(rows)]
    table.write_text("\n".join([f"{head},product", *named]))
    train, val = split_pairs(open_source(table, Columns(group="product")))
    assert 3 <= len(val) <= 12
    assert not set(train[train <= 50] // 3) & set(val[val <= 50] // 3)


def test_a_list_opens_as_its_pairs(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(pairs.parent)
    columns = Columns(root=".")
    write_pair_list(tmp_path / "some.pairs", PairList(pairs.name, columns, 60, [3, 5, 59]))
    monkeypatch.chdir(tmp_path)
    source = open_source(tmp_path / "some.pairs")
    assert source[0].open().decoded().size == (48, 48)
    captions = [source[number].captions() for number in range(len(source))]
    assert captions == [("first of 1",), ("Common to 1",), ("Common to 19",)]
    write_pair_list(tmp_path / "older.pairs", PairList(str(pairs), Columns(), 61, [3]))
    refuses(r"61.*60", open_source, tmp_path / "older.pairs")
    marked = PairList(str(pairs), Columns(), 60, [3, 5, 59])
    marked = marked._replace(digest=marked.digest_in(open_source(pairs)))
    write_pair_list(tmp_path / "marked.pairs", marked)
    text = pairs.read_text()
    head, *lines = text.splitlines(keepends=True)
    pairs.write_text("".join([head, *reversed(lines)]))
    refuses("in another order", open_source, tmp_path / "marked.pairs")
    pairs.write_text(text)
    good = {"source": str(pairs), "columns": {}, "total": 60, "indices": [1]}
    wrong = [{"indices": indices} for indices in ([2, 1], [60], [], 3)]
    for change in (*wrong, {"columns": {"x": 1}}, {"source": str(tmp_path / "wrong.pairs")}):
        (tmp_path / "wrong.pairs").write_text(json.dumps({**good, **change}))
        refuses("not a list of pairs", open_source, tmp_path / "wrong.pairs")


def test_what_cannot_be_split_is_refused(tmp_path):
    for captions, pairs, words in (
        (1, 30, "same caption"),
        (2, 30, "2 groups.*15 pairs"),
        (3, 3, "3 pairs"),
    ):
        rows = [(texture(n), f"thing {n % captions}") for n in range(pairs)]
        refuses(words, split_pairs, open_source(write(tmp_path / str(captions), rows)))


def test_copied_validation_images_are_refused_or_counted(pairs, tmp_path, caplog):
    source = open_source(pairs)
    refuses(r"100.0 % .*--val", check_copies, source, [source])
    new = [(texture(1000 + n), f"new {n}") for n in range(9)]
    mixed = [*new, (texture(0, 40), "known")]
    check_copies(
        source, [open_source(write(tmp_path / str(len(rows)), rows)) for rows in (new, mixed)]
    )
    (warning,) = caplog.messages
    assert warning.startswith("10.0 % of the images")
