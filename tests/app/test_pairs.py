import csv
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from app.conftest import finished
from declip.app.map import GRID, lay_out
from declip.app.pairs import EQUAL, caption_ranks, compare_captions, equal_captions, find_similar
from declip.app.state import Jobs
from declip.errors import UserError
from declip.search.index import Index
from indices import write_pairs


def nothing(_: float) -> None:
    """Takes the progress of work."""


@pytest.fixture
def made_up(tmp_path: Path) -> Index:
    """60 pairs: captions near their images, but 5 and 6 are exchanged, 7 has none, 20 is an image twice."""
    torch.manual_seed(0)
    images = normalize(torch.randn(60, 16), dim=-1)
    images[20] = images[40]
    texts = normalize(images + 0.15 * torch.randn(60, 16), dim=-1)
    texts[[5, 6]] = texts[[6, 5]]
    texts[7] = 0
    captions = [f"caption {n}" for n in range(60)]
    captions[7], captions[11], captions[12] = "", "the same ", "The  same"
    return write_pairs(tmp_path / "made", images, texts, captions)


def test_exchanged_captions_disagree_most(made_up: Index) -> None:
    found = compare_captions(made_up, nothing)
    assert set(found.ids[:2].tolist()) == {5, 6}
    assert found.without == 1
    assert 7 not in found.ids
    own = (made_up.vectors(found.ids) * made_up.vectors(found.ids, "captions")).sum(1).numpy()
    np.testing.assert_allclose(found.cosines, own, atol=1e-6)
    assert found.median == pytest.approx(float(np.median(own)), abs=1e-6)
    assert found.deviations(found.median - 2 * found.spread) == pytest.approx(-2)
    assert found.below(float(found.cosines[2])).tolist() == found.ids[:2].tolist()


def test_ranks_equal_the_plain_loop(made_up: Index) -> None:
    images, texts = made_up.vectors(made_up.ids), made_up.vectors(made_up.ids, "captions")
    for id, rank in zip((3, 5, 20), caption_ranks(made_up, [3, 5, 20]), strict=True):
        own = float(images[id] @ texts[id])
        better = [other for other in range(60) if other != 7 and float(images[id] @ texts[other]) > own + EQUAL]
        assert rank.rank == 1 + len(better)
        assert rank.nearest == int((texts @ images[id]).masked_fill(~texts.any(1), -2).argmax())
    assert caption_ranks(made_up, [5])[0].nearest == 6


def test_similar_images_are_those_of_all_with_all(made_up: Index) -> None:
    similar = find_similar(made_up, nothing)
    groups = similar.groups(0.999)
    assert [group.ids for group in groups] == [[20, 40]]
    assert groups[0].cosine == pytest.approx(1, abs=1e-5)
    images = made_up.vectors(made_up.ids)
    cosines = (images @ images.T).triu(1)
    expected = {(int(a), int(b)) for a, b in (cosines >= 0.8).nonzero()}
    assert set(zip(similar.one.tolist(), similar.other.tolist(), strict=True)) == expected
    assert similar.groups(1.1) == []
    assert [group.ids for group in equal_captions(made_up)] == [[11, 12]], "but for case and white space"


def test_a_group_is_joined_through_its_members(tmp_path: Path) -> None:
    angles = torch.tensor([0.0, 0.3, 0.6, 2.0, 2.2])
    images = torch.stack([angles.cos(), angles.sin()], 1)
    index = write_pairs(tmp_path / "row", images, images, ["a"] * 5)
    groups = find_similar(index, nothing).groups(float(np.cos(0.31)))
    assert [group.ids for group in groups] == [[3, 4], [0, 1, 2]]
    assert groups[1].cosine == pytest.approx(np.cos(0.3), abs=1e-5)
    same = write_pairs(tmp_path / "same", torch.full((40, 4), 0.5), torch.full((40, 4), 0.5), ["a"] * 40)
    assert [len(group.ids) for group in find_similar(same, nothing).groups(0.99)] == [40]


def test_the_map_has_the_two_directions_of_the_largest_variance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(200, 8) * torch.tensor([0.01, 2.0, 0.01, 0.01, 1.0, 0.01, 0.01, 0.01])
    index = write_pairs(tmp_path / "flat", images, images, ["a"] * 200)
    found = lay_out(index, "images", "pca", nothing)
    assert found.explained == pytest.approx(1, abs=1e-3)
    assert found.places.min() >= 0
    assert found.places.max() == GRID
    centered = (images - images.mean(0)).numpy()
    directions = np.linalg.svd(centered, full_matrices=False)[2][:2]
    for axis, direction in enumerate(directions):
        inner = (found.places[:, axis] > 0) & (found.places[:, axis] < GRID)
        assert inner.sum() > 190
        assert abs(np.corrcoef(found.places[inner, axis], centered[inner] @ direction)[0, 1]) > 0.9999


def test_the_map_of_captions_leaves_out_images_without_and_umap_is_optional(made_up: Index, monkeypatch: Any) -> None:
    assert len(lay_out(made_up, "captions", "pca", nothing).ids) == 59
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        lay_out(made_up, "images", "umap", nothing)


def test_the_page_gets_what_was_found(client: Any, state: Any) -> None:
    answer = finished(client, "/api/pairs")
    assert len(answer["edges"]) == len(answer["counts"]) + 1
    assert (answer["state"], answer["pairs"], answer["without"], sum(answer["counts"])) == ("ready", 24, 0, 24)
    found = compare_captions(state.index, nothing)
    rows = finished(client, "/api/pairs/disagreeing")["rows"]
    assert [row["id"] for row in rows] == found.ids.tolist()
    assert [row["cosine"] for row in rows] == pytest.approx(found.cosines.tolist(), abs=1e-6)
    assert [row["rank"] for row in rows] == [rank.rank for rank in caption_ranks(state.index, found.ids.tolist())]
    assert finished(client, "/api/pairs/disagreeing?start=20")["rows"][0]["id"] == rows[20]["id"]
    groups = finished(client, "/api/pairs/duplicates?threshold=0.8")
    assert groups["extra"] == sum(group["size"] - 1 for group in groups["groups"])
    assert finished(client, "/api/pairs/captions")["groups"] == []
    points = finished(client, "/api/pairs/map?over=captions")
    assert sorted(points["ids"]) == state.index.ids.tolist()
    assert len(points["x"]) == len(points["y"]) == len(points["deviations"]) == 24
    below = rows[5]["cosine"]
    assert len(finished(client, f"/api/pairs/chosen?below={below}")["ids"]) == 5
    extra = finished(client, "/api/pairs/chosen?rule=duplicate&threshold=0.8")["ids"]
    assert len(extra) == groups["extra"]


def test_a_wrong_question_about_pairs_is_refused(client: Any) -> None:
    finished(client, "/api/pairs")
    finished(client, "/api/pairs/duplicates")
    for wrong in ("disagreeing?start=25", "duplicates?threshold=0.5", "duplicates?threshold=x", "map?method=tsne"):
        assert client.get(f"/api/pairs/{wrong}").status_code == 400, wrong
    for tree in ({}, {"hand": []}, {"other": [1]}, {"hand": 1}, {"hand": ["x"]}, {"hand": [99]}, {"hand": [-1]}):
        assert client.post("/api/pairs/list", json=tree).status_code == 400, tree


def test_the_list_is_csv_with_keys_and_reasons(client: Any, state: Any) -> None:
    finished(client, "/api/pairs")
    answer = client.post("/api/pairs/list", json={"disagree": [3, 1], "hand": [3, 8]})
    assert answer.headers["content-type"].startswith("text/csv")
    assert "drop.csv" in answer.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["key"], int(row["place"])) for row in rows] == [(state.index.row(n).key, n) for n in (1, 3, 8)]
    assert [row["reason"] for row in rows] == ["image and caption disagree"] * 2 + ["chosen by hand"]
    found = compare_captions(state.index, nothing)
    assert float(rows[0]["cosine"]) == pytest.approx(float(found.cosines[found.ids.tolist().index(1)]), abs=1e-4)


def test_work_is_done_once_and_its_failure_is_kept() -> None:
    jobs, calls = Jobs(), []

    def work(report: Any) -> int:
        report(0.5)
        calls.append(1)
        return 7

    def wrong(report: Any) -> None:
        raise UserError("too many")

    assert jobs.get("a", work) is jobs.get("a", work)
    failed = jobs.get("b", wrong)
    while not failed.error:
        time.sleep(0.01)
    assert (jobs.get("a", work).result, failed.error) == (7, "too many")
    jobs.stop()
    late = jobs.get("c", work)
    while not late.error:
        time.sleep(0.01)
    assert calls == [1], "no job starts after the end"
