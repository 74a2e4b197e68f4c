import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import declip
from app.conftest import ask, finished, png
from conftest import draw
from declip.app.state import AppState
from declip.models.dual_encoder import DualEncoder


def test_a_text_finds_the_hits_of_the_index_among_images_and_captions(client: Any, state: Any) -> None:
    tree = client.get("/api/search", params={"text": "a red circle", "count": 5}).json()
    expected = state.index.search("a red circle", k=5)
    assert [(hit["id"], hit["captions"]) for hit in tree["hits"]] == [(hit.id, list(hit.captions)) for hit in expected]
    assert [hit["cosine"] for hit in tree["hits"]] == pytest.approx([hit.score for hit in expected], abs=1e-6)
    assert tree["images"] == 24
    asked = {"text": "red", "over": "captions", "template": "a {} bar", "count": 3}
    expected = state.index.search("red", template="a {} bar", over="captions", k=3)
    assert [hit["id"] for hit in client.get("/api/search", params=asked).json()["hits"]] == [hit.id for hit in expected]


def test_an_image_finds_the_index_hits_and_the_balance_moves_to_the_text(client: Any, state: Any) -> None:
    token = client.post("/api/images", content=png(draw("green", "bar"))).json()["image"]
    hits = client.get("/api/search", params={"image": token}).json()["hits"]
    expected = state.index.search(image=draw("green", "bar"), k=24)
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert next(hit["cosine"] for hit in hits if hit["key"] == "green-bar.png") == pytest.approx(1, abs=1e-3)
    assert client.get(f"/api/search?id={hits[0]['id']}").json()["hits"][0]["id"] == hits[0]["id"]
    by_text = client.get("/api/search", params={"text": "a red circle"}).json()["hits"]
    for weight, alone in ((0, hits), (1, by_text)):
        both = client.get("/api/search", params={"image": token, "text": "a red circle", "weight": weight}).json()
        assert [hit["id"] for hit in both["hits"]] == [hit["id"] for hit in alone]


def test_a_wrong_search_names_its_parameter(client: Any) -> None:
    wrong: tuple[tuple[dict[str, str], str], ...] = (
        ({"text": "   "}, "image"),
        ({"text": "x" * 2_001}, "text"),
        ({"text": "a", "count": "0"}, "count"),
        ({"text": "a", "count": "1e3"}, "count"),
        ({"text": "a", "over": "files"}, "over"),
        ({"text": "a", "id": "0", "weight": "nan"}, "weight"),
        ({"id": "99999999999999999999999"}, "id"),
        ({"id": "24"}, "24"),
    )
    for asked, named in wrong:
        answer = client.get("/api/search", params=asked)
        assert answer.status_code == 400, asked
        assert named in answer.json()["error"]


def test_thumbnails_are_small_images_by_id(client: Any, state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = client.get("/thumbnails/3")
    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).size == (40, 40)
    monkeypatch.setattr(state.index, "image", lambda id: draw("red", "circle", 400))
    assert Image.open(io.BytesIO(client.get("/thumbnails/4").content)).size == (192, 192)
    monkeypatch.undo()
    for id in ("24", "-1", "x", "..%2f..%2fetc%2fpasswd", "99999999999999999999", "0.png"):
        assert client.get(f"/thumbnails/{id}").status_code in (400, 404), id


def test_a_missing_image_gives_away_no_path(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    with ask(AppState(declip.embed(model, folder, out=tmp_path / "index"), "")) as client:
        shutil.rmtree(folder)
        answer = client.get("/thumbnails/0")
        assert answer.status_code == 404
        assert str(tmp_path) not in answer.text
        assert client.get("/api/search?text=red").status_code == 200


def test_text_of_the_source_never_becomes_markup(model: DualEncoder, tmp_path: Path) -> None:
    evil = '<img src=x onerror="alert(1)">'
    draw("red", "bar").save(tmp_path / f"{evil.replace('/', '')}.png")
    rows = [{"image": f"{evil}.png", "caption": f"</script>{evil}"}] * 3
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = declip.embed(model, tmp_path / "pairs.jsonl", out=tmp_path / "index", captions=True)
    with ask(AppState(index, evil)) as client:
        for view in ("search", "classify", "neighbors", "pairs"):
            text = client.get(f"/{view}").text
            assert "<img src=x" not in text
            assert "</script><img" not in text
        assert "&lt;img src=x" in client.get("/search").text
        found = client.get("/api/search?text=a")
        assert found.headers["content-type"] == "application/json"
        assert found.json()["hits"][0]["captions"] == [f"</script>{evil}"]


def test_neighbors_come_from_the_queue_with_the_text_it_saw_or_from_the_index(client: Any, state: Any) -> None:
    queue = state.queue
    assert (queue.filled, queue.size, queue.step) == (32, 32, 8)
    tree = client.get("/api/neighbors", params={"text": "a red circle", "count": 4}).json()
    assert tree["where"] == "queue"
    entries = queue.nearest(state.query("a red circle"), 32)
    for hit, entry in zip(tree["hits"], entries, strict=False):
        assert entry.items() <= hit.items()
        assert state.index.row(hit["id"]).key == hit["key"], "images are those of the index"
    cosines = [entry["cosine"] for entry in entries]
    assert cosines == sorted(cosines, reverse=True)
    assert len({entry["key"] for entry in entries}) == len(entries), "each pair once"
    # The features are those of an earlier step, so the text's vector is near its slot, not on it.
    assert float(state.query(entries[0]["text"]) @ state.query("a red circle")) == pytest.approx(cosines[0], abs=0.5)
    assert "32 of 32" in client.get("/neighbors").text
    tree = client.get("/api/neighbors", params={"text": "a red circle", "where": "index", "count": 4}).json()
    expected = state.index.search("a red circle", over="captions", k=4)
    assert tree["where"] == "index"
    assert [(hit["id"], hit["text"]) for hit in tree["hits"]] == [(hit.id, hit.caption) for hit in expected]


def test_without_a_queue_or_captions_the_page_says_so(
    table: Path, model: DualEncoder, folder: Path, tmp_path: Path
) -> None:
    with ask(AppState(declip.embed(model, table, out=tmp_path / "pairs", captions=True), "")) as client:
        assert "no run of this package" in client.get("/neighbors").text
        assert client.get("/api/neighbors?text=a+bar").json()["where"] == "index"
        assert client.get("/api/neighbors?text=a+bar&where=queue").status_code == 400
        assert client.get("/api/neighbors?text=").status_code == 400
    with ask(AppState(declip.embed(model, folder, out=tmp_path / "images"), "")) as client:
        for address in ("/api/search?text=a&over=captions", "/api/neighbors?text=a"):
            answer = client.get(address)
            assert answer.status_code == 400
            assert "--captions" in answer.json()["error"]
        assert "--captions" in client.get("/neighbors").text
        assert "--captions" in finished(client, "/api/pairs")["error"]
        assert finished(client, "/api/pairs/duplicates")["state"] == "ready"
