import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import declip
from app.conftest import ask
from conftest import draw, encoded
from declip.app.requests import LARGEST_JSON
from declip.app.state import AppState
from end_to_end.conftest import png


def test_probabilities_are_the_softmax_of_the_scaled_cosines(client, state):
    token = client.post("/api/images", content=encoded(draw("red", "circle"))).json()["image"]
    names = ["a red circle", "a blue bar", "a green square"]
    tree = client.post("/api/classify", json={"image": token, "classes": [*names, " a blue  bar ", ""]}).json()
    model = state.index.model
    with torch.no_grad():
        image = model.encode_image(model.preprocess([draw("red", "circle")]))[0]
        logits = model.logit_scale.exp() * (model.encode_text(model.tokenize(names)) @ image)
    expected = dict(zip(names, logits.softmax(0).tolist(), strict=True))
    assert {row["name"]: row["probability"] for row in tree["classes"]} == pytest.approx(expected, abs=1e-5)
    probable = [row["probability"] for row in tree["classes"]]
    assert probable == sorted(probable, reverse=True)


def test_a_template_goes_around_the_names(client, state):
    asked = {"id": 0, "classes": ["bar", "circle"], "template": "a red {}"}
    given = client.post("/api/classify", json=asked).json()["classes"]
    spelled = client.post("/api/classify", json={"id": 0, "classes": ["a red bar", "a red circle"]}).json()["classes"]
    assert [row["cosine"] for row in given] == pytest.approx([row["cosine"] for row in spelled], abs=1e-6)
    assert client.post("/api/classify", json={**asked, "template": "imagenet"}).status_code == 200


@pytest.mark.parametrize(("content", "said"), [(b"no image at all", "unreadable"), (png(7_100, 7_100), "too large")])
def test_other_files_are_refused_with_a_reason(client, content, said):
    answer = client.post("/api/images", content=content)
    assert answer.status_code == 422
    assert said in answer.json()["error"]


def test_a_huge_upload_is_refused_and_none_reaches_the_disk(client, monkeypatch):
    content = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)))
    assert len(content) > 1 << 20  # what Starlette's forms would put into a temporary file
    for maker in ("SpooledTemporaryFile", "NamedTemporaryFile", "mkstemp"):
        monkeypatch.setattr(f"tempfile.{maker}", None)  # a call of it fails
    assert client.post("/api/images", content=content).status_code == 200
    assert client.post("/api/classify", content=b" " * (LARGEST_JSON + 1)).status_code == 413
    monkeypatch.setattr("declip.app.answers.LARGEST_UPLOAD", 1_000)
    assert client.post("/api/images", content=iter([bytes(100)] * 100)).status_code == 413


def test_a_wrong_question_is_answered_with_a_sentence(client):
    wrong = (
        ({"classes": ["a"]}, "no image yet"),
        ({"classes": ["", "  "], "id": 0}, "There is no class yet"),
        ({"classes": "cat", "id": 0}, "classes: Input should be a valid array"),
        ({"classes": ["\ud800"], "id": 0}, "Invalid JSON"),
        ({"classes": [str(n) for n in range(1_001)], "id": 0}, "At most 1,000 classes"),
        ({"classes": [str(n) for n in range(900)], "id": 0, "template": "imagenet"}, "8,000"),
        ({"classes": ["a"], "id": 0, "template": "imagenat"}, "Did you mean 'imagenet'"),
        ({"classes": ["a"], "id": "../0"}, "id: Input should be a valid integer"),
        ({"classes": ["a"], "image": "unknown"}, "no longer has"),
    )
    for tree, message in wrong:
        answer = client.post("/api/classify", content=json.dumps(tree))
        assert answer.status_code in (400, 410), tree
        assert message in answer.json()["error"]
    for content in (b"[]", b"{", b"\xff", b"[" * 100_000, b"null"):
        assert client.post("/api/classify", content=content).status_code == 400


def test_vectors_of_the_latest_uploads_alone_are_kept(state, monkeypatch):
    monkeypatch.setattr("declip.app.state.MOST_UPLOADS", 2)
    state.uploads.clear()
    tokens = [state.add_upload(torch.full((1,), float(n))) for n in range(3)]
    assert [state.uploads.get(token) for token in tokens] == [None, 1.0, 2.0]


def test_a_text_finds_the_hits_of_the_index_among_images_and_captions(client, state):
    tree = client.get("/api/search", params={"text": "a red circle", "count": 5}).json()
    expected = state.index.search("a red circle", k=5)
    assert [(hit["id"], hit["captions"]) for hit in tree["hits"]] == [(hit.id, list(hit.captions)) for hit in expected]
    assert [hit["cosine"] for hit in tree["hits"]] == pytest.approx([hit.score for hit in expected], abs=1e-6)
    assert tree["images"] == 24
    asked = {"text": "red", "over": "captions", "template": "a {} bar", "count": 3}
    expected = state.index.search("red", template="a {} bar", over="captions", k=3)
    assert [hit["id"] for hit in client.get("/api/search", params=asked).json()["hits"]] == [hit.id for hit in expected]


def test_an_image_finds_the_index_hits_and_the_balance_moves_to_the_text(client, state):
    token = client.post("/api/images", content=encoded(draw("green", "bar"))).json()["image"]
    hits = client.get("/api/search", params={"image": token}).json()["hits"]
    expected = state.index.search(image=draw("green", "bar"), k=24)
    assert [hit["id"] for hit in hits] == [hit.id for hit in expected]
    assert next(hit["cosine"] for hit in hits if hit["key"] == "green-bar.png") == pytest.approx(1, abs=1e-3)
    assert client.get(f"/api/search?id={hits[0]['id']}").json()["hits"][0]["id"] == hits[0]["id"]
    by_text = client.get("/api/search", params={"text": "a red circle"}).json()["hits"]
    for weight, alone in ((0, hits), (1, by_text)):
        both = client.get("/api/search", params={"image": token, "text": "a red circle", "weight": weight}).json()
        assert [hit["id"] for hit in both["hits"]] == [hit["id"] for hit in alone]


def test_a_wrong_search_names_its_parameter(client):
    wrong = {
        "text=+": "image", f"text={'x' * 2_001}": "text", "text=a&count=0": "count", "text=a&over=files": "over",
        "id=0&text=a&weight=nan": "weight", "id=99999999999999999999999": "id", "id=24": "24",
    }  # fmt: skip
    for asked, named in wrong.items():
        answer = client.get(f"/api/search?{asked}")
        assert answer.status_code == 400, asked
        assert named in answer.json()["error"]


def test_thumbnails_are_small_images_by_id(client, state, monkeypatch):
    answer = client.get("/thumbnails/3")
    assert answer.headers["content-type"] == "image/webp"
    assert Image.open(io.BytesIO(answer.content)).size == (40, 40)
    monkeypatch.setattr(state.index, "image", lambda id: draw("red", "circle", 400))
    assert Image.open(io.BytesIO(client.get("/thumbnails/4").content)).size == (192, 192)
    monkeypatch.undo()
    for id in ("24", "-1", "x", "..%2f..%2fetc%2fpasswd", "99999999999999999999", "0.png"):
        assert client.get(f"/thumbnails/{id}").status_code in (400, 404), id


def test_a_missing_image_gives_away_no_path(model, folder, tmp_path):
    with ask(AppState(declip.embed(model, folder, out=tmp_path / "index"), "")) as client:
        shutil.rmtree(folder)
        answer = client.get("/thumbnails/0")
        assert answer.status_code == 404
        assert str(tmp_path) not in answer.text
        assert client.get("/api/search?text=red").status_code == 200


def test_text_of_the_source_never_becomes_markup(model, tmp_path):
    evil = '<img src=x onerror="alert(1)">'
    draw("red", "bar").save(tmp_path / f"{evil.replace('/', '')}.png")
    rows = [{"image": f"{evil}.png", "caption": f"</script>{evil}"}] * 3
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = declip.embed(model, tmp_path / "pairs.jsonl", out=tmp_path / "index", captions=True)
    with ask(AppState(index, evil)) as client:
        for view in ("search", "classify", "pairs"):
            text = client.get(f"/{view}").text
            assert "<img src=x" not in text
            assert "</script><img" not in text
        assert "&lt;img src=x" in client.get("/search").text
        found = client.get("/api/search?text=a")
        assert found.headers["content-type"] == "application/json"
        assert found.json()["hits"][0]["captions"] == [f"</script>{evil}"]


def test_an_index_without_captions_says_how_to_get_them(model, folder, tmp_path):
    with ask(AppState(declip.embed(model, folder, out=tmp_path / "images"), "")) as client:
        for address in ("/api/search?text=a&over=captions", "/api/pairs/disagreeing"):
            answer = client.get(address)
            assert answer.status_code == 400
            assert "--captions" in answer.json()["error"]
        assert client.get("/api/pairs/duplicates").status_code == 200
