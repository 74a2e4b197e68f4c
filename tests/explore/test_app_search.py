import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import declip
from conftest import draw
from declip.models.dual_encoder import DualEncoder
from explore.conftest import PAGE

pytest.importorskip("starlette", reason="the page needs declip[app]")

from declip.app.gallery import Gallery
from declip.app.queue import QueueOfRun
from declip.app.run_folders import RunFolders
from declip.app.thumbnails import Thumbnails
from declip.app.web import build


def test_a_text_finds_what_the_index_finds(client: Any, gallery: Any) -> None:
    tree = client.get("/api/search", params={"text": "a red circle", "count": 5}).json()
    expected = gallery.index.search("a red circle", k=5)
    assert [(hit["id"], hit["captions"]) for hit in tree["hits"]] == [(hit.id, list(hit.captions)) for hit in expected]
    assert [hit["cosine"] for hit in tree["hits"]] == pytest.approx([hit.score for hit in expected], abs=1e-6)
    assert tree["images"] == 24


def test_captions_and_templates_are_searched_as_asked(client: Any, gallery: Any) -> None:
    tree = client.get(
        "/api/search", params={"text": "red", "over": "captions", "template": "a {} bar", "count": 3}
    ).json()
    expected = gallery.index.search("red", template="a {} bar", over="captions", k=3)
    assert [hit["id"] for hit in tree["hits"]] == [hit.id for hit in expected]


def test_a_picture_finds_what_the_index_finds_and_the_balance_moves_to_the_text(client: Any, gallery: Any) -> None:
    written = io.BytesIO()
    draw("green", "bar").save(written, "PNG")
    token = client.post("/api/pictures", content=written.getvalue()).json()["picture"]
    found = client.get("/api/search", params={"picture": token}).json()["hits"]
    expected = gallery.index.search(image=draw("green", "bar"), k=24)
    assert [hit["id"] for hit in found] == [hit.id for hit in expected]
    assert next(hit["cosine"] for hit in found if hit["key"] == "green-bar.png") == pytest.approx(1, abs=1e-3)
    by_text = client.get("/api/search", params={"text": "a red circle"}).json()["hits"]
    for weight, alone in ((0, found), (1, by_text)):
        both = client.get("/api/search", params={"picture": token, "text": "a red circle", "weight": weight}).json()
        assert [hit["id"] for hit in both["hits"]] == [hit["id"] for hit in alone]


def test_an_image_of_the_index_finds_those_like_it(client: Any, gallery: Any) -> None:
    ids, cosines = gallery.index.nearest(gallery.index.vectors([7]), 24)
    hits = client.get("/api/search?id=7").json()["hits"]
    assert [hit["id"] for hit in hits] == ids[0].tolist()
    assert dict(zip(ids[0].tolist(), cosines[0].tolist(), strict=True))[7] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({}, "Type what to look for"),
        ({"text": "   "}, "Type what to look for"),
        ({"text": "x" * 2_001}, "too long"),
        ({"text": "a", "count": "0"}, "count must be"),
        ({"text": "a", "count": "201"}, "count must be"),
        ({"text": "a", "count": "1e3"}, "count must be"),
        ({"text": "a", "over": "files"}, "over must be"),
        ({"text": "a", "id": "0", "weight": "nan"}, "weight must be"),
        ({"id": "../../etc/passwd"}, "whole number"),
        ({"id": "99999999999999999999999"}, "whole number"),
        ({"id": "24"}, "no image with the id 24"),
    ],
)
def test_a_wrong_search_is_answered_with_a_sentence(client: Any, asked: dict[str, str], said: str) -> None:
    answer = client.get("/api/search", params=asked)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_thumbnails_are_small_pictures_by_id(client: Any) -> None:
    answer = client.get("/thumbnails/3")
    assert answer.headers["content-type"] in ("image/webp", "image/jpeg")
    assert Image.open(io.BytesIO(answer.content)).size == (40, 40)


@pytest.mark.parametrize(
    "id", ["24", "-1", "x", "..%2f..%2fetc%2fpasswd", "99999999999999999999", "0?size=huge", "0.png"]
)
def test_another_id_has_no_picture(client: Any, id: str) -> None:
    assert client.get(f"/thumbnails/{id}").status_code in (400, 404)


def test_a_picture_that_is_gone_says_no_path(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    index = declip.embed(model, folder, out=tmp_path / "index")
    shutil.rmtree(folder)
    with TestClient(build(Gallery(index, "", RunFolders([])), "localhost"), base_url=PAGE) as client:
        answer = client.get("/thumbnails/0")
        assert answer.status_code == 404
        assert str(tmp_path) not in answer.text
        assert client.get("/api/search?text=red").status_code == 200


def test_thumbnails_keep_within_their_room() -> None:
    made = []

    def picture(id: int) -> Image.Image:
        made.append(id)
        return draw("red", "circle", 400)

    one = len(Thumbnails(picture).get(0))
    thumbnails = Thumbnails(picture, kept_bytes=2 * one)
    for id in (1, 2, 1, 3, 1):
        assert Image.open(io.BytesIO(thumbnails.get(id))).size == (192, 192)
    assert made == [0, 1, 2, 3]
    assert thumbnails.bytes <= 2 * one
    thumbnails.get(2)
    assert made[-1] == 2, "the least used went first"


def test_what_the_source_says_never_becomes_markup(model: DualEncoder, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    evil = '<img src=x onerror="alert(1)">'
    draw("red", "bar").save(tmp_path / f"{evil.replace('/', '')}.png")
    rows = [{"image": f"{evil}.png", "caption": f"</script>{evil}"}] * 3
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = declip.embed(model, tmp_path / "pairs.jsonl", out=tmp_path / "index", captions=True)
    with TestClient(build(Gallery(index, evil, RunFolders([])), "localhost"), base_url=PAGE) as client:
        for view in ("search", "classify", "neighbors", "pairs"):
            text = client.get(f"/{view}").text
            assert "<img src=x" not in text
            assert "</script><img" not in text
        assert "&lt;img src=x" in client.get("/search").text
        found = client.get("/api/search?text=a")
        assert found.headers["content-type"] == "application/json"
        assert found.json()["hits"][0]["captions"] == [f"</script>{evil}"]


def test_neighbors_come_from_the_queue_with_the_words_it_saw(client: Any, gallery: Any) -> None:
    queue = gallery.queue
    assert isinstance(queue, QueueOfRun)
    assert (queue.held, queue.size, queue.step) == (32, 32, 8)
    tree = client.get("/api/neighbors", params={"text": "a red circle", "count": 4}).json()
    assert tree["where"] == "queue"
    query = gallery.query("a red circle")
    slots = (queue._features @ query).argsort(descending=True).tolist()
    pairs = list(dict.fromkeys(int(queue._pairs[slot]) for slot in slots))[:4]
    names = [gallery.index.row(pair).key for pair in pairs]
    assert [hit["key"] for hit in tree["hits"]] == names
    assert [hit["id"] for hit in tree["hits"]] == pairs, "pictures are those of the index"
    model = gallery.index.model
    with torch.no_grad():  # its features are those of an earlier step, so the words are near the slot, not on it
        words = model.encode_text(model.tokenize([hit["words"] for hit in tree["hits"]]))
    assert (words * queue._features[[slots[0]]]).sum(1)[0] > 0.5
    assert "the queue of the run at step 8: 32 of 32" in client.get("/neighbors").text


def test_neighbors_in_the_index_are_the_nearest_captions(client: Any, gallery: Any) -> None:
    tree = client.get("/api/neighbors", params={"text": "a red circle", "where": "index", "count": 4}).json()
    expected = gallery.index.search("a red circle", over="captions", k=4)
    assert tree["where"] == "index"
    assert [hit["id"] for hit in tree["hits"]] == [hit.id for hit in expected]
    assert tree["hits"][0]["words"] == expected[0].caption


def test_without_a_queue_the_page_says_why_and_takes_the_index(weights_file: Path, table: Path, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    index = declip.embed(weights_file, table, out=tmp_path / "index", captions=True)
    with TestClient(build(Gallery(index, str(weights_file), RunFolders([])), "localhost"), base_url=PAGE) as client:
        assert "No queue is shown. The model is no run of this package" in client.get("/neighbors").text
        assert client.get("/api/neighbors?text=a+bar").json()["where"] == "index"
        assert client.get("/api/neighbors?text=a+bar&where=queue").status_code == 400
        assert client.get("/api/neighbors?text=").status_code == 400


def test_an_index_without_captions_says_what_is_missing(model: DualEncoder, folder: Path, tmp_path: Path) -> None:
    from starlette.testclient import TestClient

    index = declip.embed(model, folder, out=tmp_path / "index")
    with TestClient(build(Gallery(index, "", RunFolders([])), "localhost"), base_url=PAGE) as client:
        assert "no vectors of captions" in client.get("/api/search?text=a&over=captions").json()["error"]
        assert "no vectors of captions" in client.get("/api/neighbors?text=a").json()["error"]
        assert "embed with --captions" in client.get("/neighbors").text
