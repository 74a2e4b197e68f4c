import csv
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

import declip
from declip.data.sources.origin import Origin
from declip.errors import UserError
from declip.models.dual_encoder import DualEncoder
from declip.search.index import Index
from declip.search.parts import Row, batch_of, write_part
from explore.conftest import PAGE, finished, made_up_manifest

pytest.importorskip("starlette", reason="the page needs declip[app]")

from declip.app.agreement import EQUAL, agreement, ranks
from declip.app.duplicates import equal_captions, find_couples
from declip.app.gallery import Gallery
from declip.app.jobs import Jobs
from declip.app.layout import GRID, lay_out
from declip.app.run_folders import RunFolders
from declip.app.web import build


def nothing(_: float) -> None:
    """Takes the progress of work."""


def write_pairs(folder: Path, images: Tensor, texts: Tensor, captions: list[str]) -> Index:
    """An index of made-up vectors of images and captions."""
    manifest = made_up_manifest(images.shape[1], captions=True)
    folder.mkdir(parents=True)
    rows = [Row(n, f"key {n}", (text,) if text else (), n, Origin()) for n, text in enumerate(captions)]
    manifest.parts = [write_part(folder, 0, batch_of(manifest, rows, images, texts))]
    manifest.next_id = len(rows)
    manifest.save(folder)
    return Index.open(folder)


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
    found = agreement(made_up, nothing)
    assert set(found.ids[:2].tolist()) == {5, 6}
    assert found.without == 1
    assert 7 not in found.ids
    own = (made_up.vectors(found.ids) * made_up.vectors(found.ids, "captions")).sum(1).numpy()
    np.testing.assert_allclose(found.cosines, own, atol=1e-6)
    assert found.median == pytest.approx(float(np.median(own)), abs=1e-6)
    assert found.deviations(found.median - 2 * found.spread) == pytest.approx(-2)
    assert found.below(float(found.cosines[2])).tolist() == found.ids[:2].tolist()
    counts, edges = found.histogram()
    assert sum(counts) == 59
    assert len(edges) == len(counts) + 1


def test_ranks_equal_the_plain_loop(made_up: Index) -> None:
    images, texts = made_up.vectors(made_up.ids), made_up.vectors(made_up.ids, "captions")
    for id, rank in zip((3, 5, 20), ranks(made_up, [3, 5, 20]), strict=True):
        own = float(images[id] @ texts[id])
        better = [other for other in range(60) if other != 7 and float(images[id] @ texts[other]) > own + EQUAL]
        assert rank.rank == 1 + len(better)
        assert rank.nearest == int((texts @ images[id]).masked_fill(~texts.any(1), -2).argmax())
    assert ranks(made_up, [5])[0].nearest == 6


def test_couples_are_those_of_all_with_all(made_up: Index) -> None:
    couples = find_couples(made_up, nothing)
    groups = couples.groups(0.999)
    assert [group.ids for group in groups] == [[20, 40]]
    assert groups[0].cosine == pytest.approx(1, abs=1e-5)
    images = made_up.vectors(made_up.ids)
    cosines = (images @ images.T).triu(1)
    expected = {(int(a), int(b)) for a, b in (cosines >= 0.8).nonzero()}
    assert set(zip(couples.one.tolist(), couples.other.tolist(), strict=True)) == expected
    assert couples.groups(1.1) == []


def test_a_group_is_joined_through_its_members(tmp_path: Path) -> None:
    angles = torch.tensor([0.0, 0.3, 0.6, 2.0, 2.2])
    images = torch.stack([angles.cos(), angles.sin()], 1)
    index = write_pairs(tmp_path / "row", images, images, ["a"] * 5)
    groups = find_couples(index, nothing).groups(float(np.cos(0.31)))
    assert [group.ids for group in groups] == [[3, 4], [0, 1, 2]]
    assert groups[1].cosine == pytest.approx(np.cos(0.3), abs=1e-5)


def test_many_equal_images_are_one_group(tmp_path: Path) -> None:
    images = normalize(torch.ones(40, 4), dim=-1)
    index = write_pairs(tmp_path / "same", images, images, ["a"] * 40)
    assert [len(group.ids) for group in find_couples(index, nothing).groups(0.99)] == [40]


def test_equal_captions_differ_in_case_and_white_space_at_most(made_up: Index) -> None:
    assert [group.ids for group in equal_captions(made_up)] == [[11, 12]]


def test_the_map_has_the_two_directions_of_the_largest_variance(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(200, 8) * torch.tensor([0.01, 2.0, 0.01, 0.01, 1.0, 0.01, 0.01, 0.01])
    index = write_pairs(tmp_path / "flat", images, images, ["a"] * 200)
    found = lay_out(index, "images", "pca", nothing)
    assert found.explained == pytest.approx(1, abs=1e-3)
    assert found.places.min() >= 0
    assert found.places.max() == GRID
    centerd = (images - images.mean(0)).numpy()
    directions = np.linalg.svd(centerd, full_matrices=False)[2][:2]
    for axis, direction in enumerate(directions):
        inner = (found.places[:, axis] > 0) & (found.places[:, axis] < GRID)
        assert inner.sum() > 190
        assert abs(np.corrcoef(found.places[inner, axis], centerd[inner] @ direction)[0, 1]) > 0.9999


def test_umap_is_offered_where_it_is_installed(made_up: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.machinery

    fake = ModuleType("umap")
    fake.__spec__ = importlib.machinery.ModuleSpec("umap", None)
    asked = []

    class UMAP:
        def __init__(self, **options: object) -> None:
            asked.append(options)

        def fit_transform(self, vectors: np.ndarray) -> np.ndarray:
            return vectors[:, :2]

    fake.UMAP = UMAP  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umap", fake)
    assert len(lay_out(made_up, "captions", "umap", nothing).ids) == 59, "one has no caption"
    assert asked[0]["metric"] == "cosine"
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        lay_out(made_up, "images", "umap", nothing)
    with pytest.raises(UserError, match="Unknown map 'tsne'"):
        lay_out(made_up, "images", "tsne", nothing)


def test_the_page_gets_what_was_found(client: Any, gallery: Any) -> None:
    state = finished(client, "/api/pairs")
    assert (state["state"], state["pairs"], state["images"], state["without"]) == ("ready", 24, 24, 0)
    found = agreement(gallery.index, nothing)
    rows = finished(client, "/api/pairs/disagreeing")["rows"]
    assert [row["id"] for row in rows] == found.ids.tolist()
    assert [row["cosine"] for row in rows] == pytest.approx(found.cosines.tolist(), abs=1e-6)
    assert [row["rank"] for row in rows] == [rank.rank for rank in ranks(gallery.index, found.ids.tolist())]
    assert finished(client, "/api/pairs/disagreeing?start=20")["rows"][0]["id"] == rows[20]["id"]
    groups = finished(client, "/api/pairs/duplicates?threshold=0.8")
    assert groups["extra"] == sum(group["size"] - 1 for group in groups["groups"])
    assert finished(client, "/api/pairs/captions")["groups"] == []
    points = finished(client, "/api/pairs/map?over=captions")
    assert sorted(points["ids"]) == gallery.index.ids.tolist()
    assert len(points["x"]) == len(points["y"]) == len(points["deviations"]) == 24
    below = rows[5]["cosine"]
    assert len(finished(client, f"/api/pairs/chosen?below={below}")["ids"]) == 5
    extra = finished(client, "/api/pairs/chosen?rule=duplicate&threshold=0.8")["ids"]
    assert len(extra) == groups["extra"]


@pytest.mark.parametrize(
    "address",
    [
        "disagreeing?start=25",
        "duplicates?threshold=0.5",
        "duplicates?threshold=x",
        "map?method=tsne",
        "chosen?rule=all",
    ],
)
def test_a_wrong_question_about_pairs_is_refused(client: Any, address: str) -> None:
    finished(client, "/api/pairs")
    finished(client, "/api/pairs/duplicates")
    assert client.get(f"/api/pairs/{address}").status_code == 400


def test_the_list_is_csv_with_keys_and_reasons(client: Any, gallery: Any) -> None:
    finished(client, "/api/pairs")
    answer = client.post("/api/pairs/list", json={"disagree": [3, 1], "hand": [3, 8]})
    assert answer.headers["content-type"].startswith("text/csv")
    assert "drop.csv" in answer.headers["content-disposition"]
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["key"], int(row["place"])) for row in rows] == [(gallery.index.row(n).key, n) for n in (1, 3, 8)]
    assert [row["reason"] for row in rows] == ["image and caption disagree"] * 2 + ["chosen by hand"]
    found = agreement(gallery.index, nothing)
    assert float(rows[0]["cosine"]) == pytest.approx(float(found.cosines[found.ids.tolist().index(1)]), abs=1e-4)


@pytest.mark.parametrize(
    "tree", [{}, {"hand": []}, {"other": [1]}, {"hand": 1}, {"hand": ["x"]}, {"hand": [99]}, {"hand": [-1]}]
)
def test_a_wrong_list_is_refused(client: Any, tree: dict[str, Any]) -> None:
    assert client.post("/api/pairs/list", json=tree).status_code == 400


def test_without_captions_the_page_says_what_to_do(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    index = declip.embed(model, folder, out=tmp_path / "index")
    with TestClient(build(Gallery(index, "", RunFolders([])), "localhost"), base_url=PAGE) as client:
        state = finished(client, "/api/pairs")
        assert state["state"] == "failed"
        assert "--captions" in state["error"]
        assert finished(client, "/api/pairs/duplicates")["state"] == "ready"
        assert finished(client, "/api/pairs/map")["deviations"] is None


def test_work_is_done_once_and_its_failure_is_kept() -> None:
    jobs, calls = Jobs(), []

    def work(tell: Any) -> int:
        calls.append(1)
        tell(0.5)
        return 7

    def wrong(tell: Any) -> None:
        raise UserError("too many")

    assert jobs.get("a", work) is jobs.get("a", work)
    failed = jobs.get("b", wrong)
    while not failed.error:
        pass
    assert (calls, jobs.get("a", work).result, failed.error) == ([1], 7, "too many")
    jobs.stop()
    late = jobs.get("c", work)
    while not late.error:
        pass
    assert calls == [1]
