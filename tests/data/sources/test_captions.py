"""Captions from several columns and from templates of label columns, in every kind of table and in Python objects."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import refuses
from data.fakes import KINDS, write
from declip.data.columns import Columns
from declip.data.pair import BrokenPair
from declip.data.sources.open import open_source
from declip.data.sources.pair_list import list_of, read_pair_list, write_pair_list
from declip.recipe.load import load_recipe, parse_overrides

NAMES = ("image", "caption", "Größe", "kind")
ROWS = [
    ("a.png", "a mug, blue", "groß", "mug"), ("b.png", "", "klein", "cup"), ("c.png", " ", "", "pan"),
    ("a.png", "second", "", ""),
]  # fmt: skip
TEMPLATE = "a {Größe}, {kind}: {kind}"
READ = [
    ("kind", ["mug", "cup", "pan"]),
    (["caption", "kind"], ["a mug, blue|mug|second", "cup", "pan"]),
    ("kind, caption", ["mug|a mug, blue|second", "cup", "pan"]),
    (TEMPLATE, ["a groß, mug: mug", "a klein, cup: cup", "empty caption: no Größe"]),
    ([TEMPLATE, "kind"], ["a groß, mug: mug|mug", "a klein, cup: cup|cup", "pan"]),
]


def read(source):
    """Captions of all pairs, or what is wrong with them."""
    said = list[str]()
    for index in range(len(source)):
        try:
            said.append("|".join(source[index].captions()))
        except BrokenPair as broken:
            said.append(f"{broken.reason}: {broken.detail}")
    return said


@pytest.mark.parametrize("kind", [*KINDS, "semicolons", "items"])
def test_captions_come_from_several_columns_and_templates(folder, kind):
    spec = [
        dict(zip(NAMES, row, strict=True)) for row in ROWS[:3]
    ]  # which are not merged by their image
    if kind == "semicolons":  # as Excel writes it in German
        spec = folder / "t.csv"
        spec.write_text("\n".join(map(";".join, [NAMES, *ROWS])), "utf-8-sig")
    elif kind != "items":
        spec = write(folder / f"t.{kind}", ROWS, NAMES)
    for given, expected in READ:
        expected = (
            [each.removesuffix("|second") for each in expected] if kind == "items" else expected
        )
        assert read(open_source(spec, Columns(caption=given, root=folder))) == expected


def test_a_column_named_like_a_list_or_a_template_is_that_column(folder):
    path = write(folder / "t.jsonl", [("a.png", "x", "y", "z")], ("image", "a,b", "{c}", "c"))
    assert read(open_source(path, Columns(caption=["a,b", "{c}"]))) == ["x|y"]


@pytest.mark.parametrize("caption", [(), 3, ("a", None)])
def test_columns_refuses_captions_that_are_not_names(caption):
    refuses((repr(caption), "template"), Columns, caption=caption)


def test_labels_may_be_numbers_lists_or_numbers_of_classes(folder):
    values = {
        "image": ["a.png", "b.png"],
        "label": [1, 0],
        "year": [1999.0, None],
        "tags": [["x", "y"], []],
    }
    stored = json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})
    table = pa.table(values).replace_schema_metadata({"huggingface": stored})
    pq.write_table(table, folder / "t.parquet")
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())))
    given = Columns(caption=["{label} {year}", "{tags}"], root=folder)
    assert read(open_source(folder / "t.parquet", given)) == [
        "dog 1999|x, y",
        "empty caption: no year, tags",
    ]
    for spec in (folder / "t.jsonl", table.to_pylist()):
        assert read(open_source(spec, given))[0] == "1 1999|x, y"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[title, description]", ("title", "description")), ("title,description", "title,description"),
     ("{brand} {model}", "{brand} {model}"), ("Marke: {brand} #{n}", "Marke: {brand} #{n}"),
     ('["{brand}", title]', ("{brand}", "title"))],
)  # fmt: skip
@pytest.mark.parametrize("recipe", ["clip", "finetune"])
def test_recipes_take_columns_and_templates_as_text(recipe, text, expected):
    given = parse_overrides([f"data.columns.caption={text}"])
    assert Columns.of(load_recipe(recipe, given).data).caption == expected


@pytest.mark.parametrize("key", ["caption", "group"])
@pytest.mark.parametrize("value", [[], [3], {"color": None}, 7])
def test_other_values_are_refused(key, value):
    refuses(
        [f"data.columns.{key}", repr(value)], load_recipe, "clip", {f"data.columns.{key}": value}
    )


def test_a_list_of_pairs_keeps_several_columns(folder):
    path, columns = write(folder / "t.csv", ROWS, NAMES), Columns(caption=["caption", "kind"])
    write_pair_list(
        folder / "some.pairs", list_of(str(path), columns, open_source(path, columns), [1, 2])
    )
    assert read_pair_list(folder / "some.pairs").columns == columns
    assert read(open_source(folder / "some.pairs")) == ["cup", "pan"]


def test_commands_take_several_columns_and_templates(folder, command):
    path = write(folder / "t.csv", ROWS, NAMES)
    words = ["--caption-column", "caption,kind", "--caption-column", "a {kind}", "--workers", "0"]
    done = command("data", "inspect", path, *words, "--json", folder / "found.json")
    assert done.status == 0
    assert (
        max(json.loads((folder / "found.json").read_text())["captions"]["per_pair"].values()) == 4
    )
