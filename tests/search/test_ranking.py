"""Hits as a person sees them: near copies and groups as one, and filters by a table's column."""

import json

import pytest
import torch
from torch.nn.functional import normalize

import declip
from conftest import draw, read_table, refuses
from declip.search.ranking import NEAR_COPY, NO_COPY, distinct, matching, near_copy
from indices import write_index


def loop(ranking, products, k, groups, limit):
    hits = []
    for position, id in enumerate(ranking):
        owner = None
        if groups and groups[id]:
            same = [h for h in hits if any(groups[ranking[p]] == groups[id] for p in h)]
            owner = same[0] if same else None
        if owner is None:
            close = [h for h in hits if products[ranking[h[0]]][id] > limit]
            owner = close[0] if close else None
        if owner is None:
            if len(hits) == k:
                break
            hits.append([position])
        else:
            owner.append(position)
    return hits


@pytest.mark.parametrize("k", [1, 7, 300])
@pytest.mark.parametrize("limit", [0.9, NEAR_COPY, 2.0])
def test_hits_are_those_of_a_loop(k, limit):
    torch.manual_seed(k)
    vectors = normalize(torch.randn(400, 3), dim=-1)
    products = (vectors @ vectors.T).tolist()
    ranking = torch.randperm(400)
    names = ["", "", "a", "b", *map(str, range(150))]
    groups = [names[n] for n in torch.randint(len(names), (400,)).tolist()]
    for given in (None, groups):
        cells = given and [(name,) for name in given]
        found = distinct(ranking, vectors, k, cells, limit)
        assert found == loop(ranking.tolist(), products, k, given, limit)


@pytest.mark.parametrize("k", [2, 3, 10])
def test_only_the_first_image_of_a_group_is_compared(k):
    read = []

    class Vectors(torch.Tensor):
        def __getitem__(self, ids):
            read.extend(ids.tolist())
            return super().__getitem__(ids).as_subclass(torch.Tensor)

    ranking, groups = torch.arange(3_000), [("a",), ("b",), ("c",)] * 1_000
    hits = distinct(ranking, torch.eye(3_000, 3).as_subclass(Vectors), k, groups)
    assert read == [0, 1, 2], "however many images the groups have"
    assert [len(hit) for hit in hits] == ([1, 1] if k == 2 else [1_000] * 3)


def test_near_copies_are_one_hit_unless_they_are_asked_for(tmp_path):
    near = normalize(torch.tensor([[1, 0, 0], [1, 0.1, 0], [1, 0.5, 0], [0, 1, 0]]), dim=-1)
    index = write_index(tmp_path / "index", near)
    hits = index.hits(near[1], 2)
    assert [(hit.key, hit.copies) for hit in hits] == [("key 1", ("key 0",)), ("key 2", ())]
    assert hits[0].to_dict()["copies"] == ["key 0"]
    assert [hit.key for hit in index.hits(near[1], 3, copies=True)] == ["key 1", "key 0", "key 2"]
    assert index.nearest(near[1:2], 3)[0].tolist() == [[1, 0, 2]], "vectors are ranked as they are"


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"color": "rot"}, [0, 3]),
        ({"color": ["rot", "gru\u0308n"]}, [0, 1, 3]),  # an umlaut of two code points
        ({"color": "rot", "size": "1,5"}, [3]),
        ({"size": ""}, [2]),
        ({"size": "7"}, [0, 1]),
    ],
)
def test_images_with_a_value_in_each_column(where, expected):
    columns = {
        "color": [("rot",), ("grün",), ("blau",), ("blau", " rot ")],
        "size": [("7",), ("7",), ("",), ("1,5",)],
    }
    assert matching({name: columns[name] for name in where}, where).tolist() == expected


@pytest.fixture
def products(weights_file, tmp_path):
    """An index of a table with columns, in the working folder."""
    lines = ["image,caption,product,note"]
    for name, product in (("red", 1), ("green", 1), ("blue", 2), ("yellow", 2), ("black", "")):
        draw(name, "circle").save(tmp_path / f"{name}.png")
        lines.append(f'{name}.png,a {name} circle,{product},"=1, {name}"')
    (tmp_path / "products.csv").write_text("\n".join(lines))
    declip.embed(weights_file, tmp_path / "products.csv", out=tmp_path / "index")
    return tmp_path


def test_the_command_filters_groups_and_writes_a_table(products, command):
    search = ["search", products / "index", "circle", "--copies"]
    out, tree = products / "hits.csv", products / "hits.json"
    done = command(*search, "--where", "product=1", "--where", "product=2", "--out", out)
    assert (done.status, "black" in done.out) == (0, False), done.err
    rows = read_table(out)
    assert {row["image"] for row in rows} == {
        f"{n}.png" for n in ("red", "green", "blue", "yellow")
    }
    done = command(*search, "--group", "product", "--json", tree)
    assert "others of product" in done.out
    result = json.loads(tree.read_text())
    assert (result["group"], sorted(len(hit["copies"]) for hit in result["hits"])) == (
        "product",
        [0, 1, 1],
    )
    command(*search, "--template", "a red {}", "--json", tree, "--overwrite")
    scores = [hit["score"] for hit in json.loads(tree.read_text())["hits"]]
    index = declip.Index.open(products / "index")
    expected = [hit.score for hit in index.search("a red circle", copies=True)]
    assert scores == pytest.approx(expected, abs=1e-4)
    done = command(*search, "--where", "note==1, red")
    assert (done.status, "red.png" in done.out, "green.png" in done.out) == (0, True, False)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--where", "produkt=1"], ["produkt", "product", "caption"]),
        (["--where", "product=3"], ["product", "'3'", "1, 2"]),
        (["--where", "product"], ["COLUMN=VALUE"]),
        (["--where", "=1"], ["COLUMN=VALUE"]),
        (["--group", "colour"], ["colour", "product"]),
    ],
)
def test_a_column_or_value_that_is_not_there_is_an_error(options, told, products, command):
    command.refused(told, "search", products / "index", "circle", *options)


def test_images_without_a_table_have_no_columns(embed, folder):
    index = embed(folder)
    refuses(["'shapes'", "not a table"], index.search, "red", where={"color": "red"})
    assert not index.column_names


def test_a_column_follows_the_images_when_the_table_changes(products):
    index = declip.Index.open(products / "index")
    before = index.column("product")
    lines = (products / "products.csv").read_text().splitlines()
    (products / "products.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]))
    assert declip.Index.open(products / "index").column("product") == before
    (products / "products.csv").write_text("\n".join(lines[:3]))
    refuses("no longer in", declip.Index.open(products / "index").column, "product")


@pytest.mark.parametrize(
    ("spread", "limit"), [(0.01, NO_COPY), (1.0, NEAR_COPY)], ids=["all alike", "told apart"]
)
@pytest.mark.parametrize("count", [3, 1_000])
def test_a_model_to_which_all_images_look_alike_has_no_near_copies(spread, limit, count):
    generator = torch.Generator().manual_seed(count)
    vectors = torch.ones(count, 16) + spread * torch.randn(count, 16, generator=generator)
    assert near_copy(normalize(vectors, dim=-1)) == limit


def test_one_image_or_two_copies_are_no_reason_to_list_copies():
    assert near_copy(torch.eye(4)[:1]) == near_copy(torch.eye(4)[[0, 0]]) == NEAR_COPY
