"""Comparing pairs: what disagrees, what is similar, and the lists of marked and other pairs."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import declip
from app.conftest import ask, assert_refused
from conftest import TINY, refuses, tiny_tree
from declip.app.pairs import PairsQuestion, compare_captions, disagreeing, find_similar
from declip.app.server import open_state
from declip.app.state import AppState
from declip.data.sources.open import open_source
from declip.recipe.schema import Recipe
from indices import write_index


@pytest.fixture
def made_up(tmp_path):
    """60 pairs: captions near their images, but 5 and 6 are exchanged, 7 has none, 20 is an image twice."""
    torch.manual_seed(0)
    images = normalize(torch.randn(60, 16), dim=-1)
    images[20] = images[40]
    texts = normalize(images + 0.15 * torch.randn(60, 16), dim=-1)
    texts[[5, 6]] = texts[[6, 5]]
    texts[7] = 0
    captions = [f"caption {n}" for n in range(60)]
    captions[7] = ""
    return AppState(write_index(tmp_path / "made", images, texts, captions), "")


def test_exchanged_captions_disagree_most(made_up):
    found = compare_captions(made_up)
    assert set(found.ids[:2].tolist()) == {5, 6}
    assert (len(found.ids), 7 in found.ids, found.ranked) == (59, False, False)
    assert found.captions == [made_up.index.row(id).caption for id in found.ids]
    images = made_up.index.vectors(found.ids)
    texts = made_up.index.vectors(found.ids, "captions")
    np.testing.assert_allclose(found.values, (images * texts).sum(1), atol=1e-6)
    assert int((found.values < found.limit).sum()) == 2


def test_each_of_several_captions_has_a_cosine_of_its_own(state):
    found = compare_captions(state)
    assert len(found.ids) == 48
    images, texts = state.index.vectors(found.ids), state.text_vectors(found.captions)
    np.testing.assert_allclose(found.values, (images * texts).sum(1).numpy(), atol=1e-3)


@pytest.fixture
def captions(shared):
    """The id, key and text of each caption of the index."""
    rows = shared.index.rows(shared.index.ids)
    return [(row.id, row.key, text) for row in rows for text in row.captions]


@pytest.fixture
def ranked(tiny_run, shared, tmp_path):
    """Gives the state of a run whose cross-validation has a rank for each of some keys and texts."""
    run = shutil.copytree(tiny_run, tmp_path / "run")

    def judged(ranks):
        with (run / "out_of_fold.csv").open("w", newline="") as file:
            table = csv.writer(file)
            table.writerow(("key", "caption", "rank"))
            table.writerows((key, text, f"{rank:.4f}") for (_, key, text), rank in ranks)
        return AppState(shared.index, str(run))

    return judged


def test_pairs_that_a_run_was_trained_on_are_judged_out_of_fold(ranked, captions):
    ranks = [(caption, (47 - number) / 48) for number, caption in enumerate(captions)]
    with ask(ranked(ranks[:36])) as client:
        answer = client.get("/api/pairs/disagreeing?limit=0.5").json()
        preset = client.get("/api/pairs/disagreeing").json()
        assert "was trained on" not in client.get("/pairs").text
    counts = [answer[name] for name in ("ranked", "total", "captions", "without")]
    assert counts == [True, 23, 36, 6]
    shown = [(row["id"], row["captions"], row["others"]) for row in answer["rows"]]
    assert shown == [(id, [text], 1) for id, _, text in captions[:23]], (
        "each caption, the worst first"
    )
    assert answer["rows"][0]["value"] == pytest.approx(47 / 48, abs=1e-4)
    assert (preset["limit"] > 0.9, preset["total"]) == (True, 1)
    with ask(ranked(ranks[:12])) as client:  # of another source, mostly
        assert not client.get("/api/pairs/disagreeing").json()["ranked"]
        assert "was trained on" in client.get("/pairs").text


def test_a_right_caption_is_not_listed_for_a_wrong_one_of_its_image(ranked, captions):
    """Image 3 has a wrong second caption; the first is the best of all."""
    wrong = captions[7]
    ranks = [(caption, 1.0 if caption == wrong else 0.1) for caption in captions]
    with ask(ranked(ranks)) as client:
        answer = client.get("/api/pairs/disagreeing").json()
        written = client.post("/api/pairs/list", json={"image and caption disagree": [3]}).json()
    assert [(row["id"], row["captions"]) for row in answer["rows"]] == [(3, [wrong[2]])]
    with open(written["drop"]) as file:
        assert json.loads(file.read())["caption"] == wrong[2]


def test_no_more_than_a_fiftieth_of_right_captions_is_listed(ranked, captions):
    """Also where ranks are bad throughout; where they are good, only those of more than 0.5."""
    for worst, listed in ((1.0, 1), (0.45, 0)):
        ranks = [(caption, worst * number / 47) for number, caption in enumerate(captions)]
        assert len(disagreeing(ranked(ranks), PairsQuestion())["rows"]) == listed


def test_similar_images_are_those_of_all_with_all(made_up):
    similar = find_similar(made_up)
    [(ids, cosine)] = similar.groups(0.999)
    assert (ids, cosine) == ([20, 40], pytest.approx(1, abs=1e-5))
    images = made_up.index.vectors(made_up.index.ids)
    expected = ((images @ images.T).triu(1) >= 0.8).nonzero()
    found = zip(similar.one.tolist(), similar.other.tolist(), strict=True)
    assert {tuple(sorted(pair)) for pair in found} == {*map(tuple, expected.tolist())}
    assert similar.groups(1.1) == []


def test_similar_images_are_joined_through_others(tmp_path):
    def groups(name, vectors, threshold):
        index = write_index(tmp_path / name, vectors, vectors, ["a"] * len(vectors))
        return find_similar(AppState(index, "")).groups(threshold)

    angles = torch.tensor([0.0, 0.3, 0.6, 2.0, 2.2])
    row = groups("row", torch.stack([angles.cos(), angles.sin()], 1), np.cos(0.31))
    assert [ids for ids, _ in row] == [[3, 4], [0, 1, 2]]
    assert row[1][1] == pytest.approx(np.cos(0.3), abs=1e-5)
    same = torch.full((40, 4), 0.49999)  # cosines of 0.99996, as float16 may have
    assert len(groups("same", same, 1.0)[0][0]) == 40


def test_the_page_gets_the_worst_pairs_and_the_groups(client, state):
    found = compare_captions(state)
    answer = client.get(f"/api/pairs/disagreeing?limit={float(found.values[5])}").json()
    assert (len(answer["edges"]), sum(answer["counts"])) == (len(answer["counts"]) + 1, 48)
    assert (answer["captions"], answer["without"], answer["total"]) == (48, 0, 5)
    rows = answer["rows"]
    assert [row["id"] for row in rows] == found.ids[:5].tolist()
    assert [row["captions"] for row in rows] == [[text] for text in found.captions[:5]]
    assert [row["value"] for row in rows] == pytest.approx(found.values[:5].tolist(), abs=1e-6)
    more = [
        client.get(f"/api/pairs/disagreeing?limit=1&start={start}").json()["rows"]
        for start in (0, 24)
    ]
    assert [row["id"] for page in more for row in page] == found.ids.tolist()
    image = state.index.vectors([rows[0]["id"]])[0]
    texts = state.index.vectors(state.index.ids, "captions")
    assert rows[0]["nearest"] == state.index.row(int((texts @ image).argmax())).caption
    groups = client.get("/api/pairs/duplicates?threshold=0.8").json()
    assert len(groups["marked"]) == sum(group["size"] - 1 for group in groups["rows"])
    assert groups["total"] == len(groups["rows"])
    for wrong in ("disagreeing?start=-1", "duplicates?threshold=0.5", "duplicates?threshold=x"):
        assert client.get(f"/api/pairs/{wrong}").status_code == 400, wrong


DISAGREE, DUPLICATE = "image and caption disagree", "near-duplicate image"
MARKED = {DISAGREE: [3, 1], DUPLICATE: [3, 8]}


def test_the_list_has_keys_and_reasons_and_all_other_pairs_are_a_source(client, state):
    for tree in ({}, {"other": [1]}, *({DUPLICATE: ids} for ids in (["x"], [99], [-1]))):
        assert client.post("/api/pairs/list", json=tree).status_code == 400, tree
    found = compare_captions(state)
    client.get("/api/pairs/disagreeing")
    written = client.post("/api/pairs/list", json=MARKED).json()
    with open(written["drop"]) as file:
        rows = [json.loads(line) for line in file]
    keys = state.index.keys()
    assert [(row["key"], row["index"]) for row in rows] == [(keys[n], n) for n in (1, 3, 8)]
    assert [row["reason"] for row in rows] == [DISAGREE, DISAGREE, DUPLICATE]
    cosine = found.values[found.ids.tolist().index(1)]
    assert rows[0]["cosine"] == pytest.approx(float(cosine), abs=1e-4)
    others = open_source(written["rest"])
    assert len(others) == written["count"] == 21
    assert {others[n].key for n in range(21)} == {*keys} - {row["key"] for row in rows}


def test_a_list_can_be_shortened_again_and_trained_on(client, state, tiny_run, tmp_path):
    first = client.post("/api/pairs/list", json=MARKED).json()["rest"]
    again = open_state(str(tiny_run), first, tmp_path / "again")
    with ask(again) as second:
        written = second.post("/api/pairs/list", json={DUPLICATE: [0]}).json()
    keys = [open_source(written["rest"])[n].key for n in range(written["count"])]
    assert keys == [key for n, key in enumerate(state.index.keys()) if n not in (0, 1, 3, 8)]
    tree = tiny_tree(written["rest"], train=TINY["train"] | {"steps": 2})
    recipe = Recipe.model_validate(tree)
    run = declip.train(recipe, out=tmp_path / "run", progress=False, report=False)
    assert run.examples["source"]["pairs"] == 20


def test_a_list_of_a_source_that_has_changed_or_of_all_pairs_is_refused(made_up, client):
    with ask(made_up) as asked:  # of an index without a source
        assert_refused(asked.post("/api/pairs/list", json={DUPLICATE: [1]}), "Python object")
    answer = client.post("/api/pairs/list", json={DUPLICATE: list(range(24))})
    assert_refused(answer, "all pairs")


def test_a_comparison_is_made_once_and_ends_with_the_server(state):
    calls = []

    def compare(state):
        state.check_running()
        calls.append(state.index)
        return 7

    assert [state.once(compare), state.once(compare)] == [7, 7]
    assert calls == [state.index]
    state.stopped.set()
    refuses("stopped", state.once, find_similar)
